"""Whoever is not the rank: a fork of it, a second thread, another rank, a call that is over."""

import os
import queue
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from places import ENGINES, Pool
from shardproof import c_modules, comm
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.errors import AxisError, UsageError
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.ranks import launch, open_ranks
from shardproof.transport.base import Call, rank_order

CALL = Call("all_reduce", "forward", "layer", (3,), torch.float32)
PATIENCE = 60.0


def fork() -> int:
    """`os.fork`, of which Python 3.12 warns where there are threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def exit_code_of(pid: int) -> int:
    """The exit code of a child, which is ended if it goes on for too long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the fork goes on")


def said_by_fork(say: Callable[[], str]) -> str:
    """What `say` returns in a fork of this process, which then ends."""
    heard, written = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            text = say()
        except BaseException:
            text = traceback.format_exc()
        os.write(written, text.encode())
        os._exit(0)
    os.close(written)
    with os.fdopen(heard) as file:
        text = file.read()
    assert exit_code_of(pid) == 0
    return text


def refusal_of(do: Callable[[], object]) -> str:
    try:
        do()
    except (AxisError, UsageError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def total(axis: Axis, value: float = 1.0) -> list[float]:
    return comm.all_reduce(torch.full((3,), value), axis, direction="forward").tolist()


@pytest.fixture(scope="module")
def over_gloo() -> Iterator[Ranks]:
    with open_ranks(2, "processes", threads=1, timeout=60.0, transport="gloo") as ranks:
        yield ranks


@pytest.fixture(params=["threads", "processes", "gloo"])
def ranks(request: pytest.FixtureRequest, pool: Pool) -> Ranks:
    if request.param == "gloo":
        found: Ranks = request.getfixturevalue("over_gloo")
        return found
    return pool(2, request.param)


# Forks of ranks --------------------------------------------------------------------------------


def test_a_fork_of_a_rank_is_refused_by_every_collective(ranks: Ranks) -> None:
    def work(axis: Axis) -> tuple[list[str], list[float]]:
        before = total(axis)
        part, x = torch.ones(3), torch.ones(3)
        started = axis.transport.start_sum([part], rank_order(axis.size), x, call=CALL)
        found: list[str] = []
        if axis.rank == 1:

            def attempt() -> str:
                sizes, y = [3] * axis.size, torch.empty(3 * axis.size)
                attempts: list[Callable[[], object]] = [
                    lambda: total(axis),
                    lambda: axis.transport.gather_objects(1, call=CALL),
                    lambda: axis.transport.all_gather(part, y, sizes, call=CALL),
                    lambda: axis.transport.exchange([], [], rounds=1, like=x, call=CALL),
                    started.wait,
                ]
                return "\n".join(map(refusal_of, attempts))

            found = said_by_fork(attempt).splitlines()
        started.wait()
        return found, [*before, *x.tolist(), *total(axis, axis.rank + 1.0)]

    (_, first), (refused, second) = ranks.run(work)
    assert first == second == [2.0] * 6 + [3.0] * 3
    assert len(refused) == 5
    for each in refused:
        assert each.startswith("AxisError: rank 1 of 2 cannot be reached here: this process is a")
        assert "communicate in the rank itself" in each


def test_a_process_group_is_not_inherited_by_a_fork(over_gloo: Ranks) -> None:
    def work(axis: Axis) -> str:
        group = dist.group.WORLD
        assert group is not None
        return said_by_fork(lambda: refusal_of(lambda: Axis.from_group(group)))

    for rank, said in enumerate(over_gloo.run(work)):
        assert f"AxisError: the process group of rank {rank} of 2 was made before a fork" in said


def come_back(axis: Axis) -> Any:
    pid = fork()
    return ("child" if pid == 0 else "rank"), pid


def raise_there(axis: Axis) -> Any:
    pid = fork()
    if pid == 0:
        raise ValueError("in the child")
    return "rank", pid


def leave_by_exit(axis: Axis) -> Any:
    pid = fork()
    if pid == 0:
        raise SystemExit(7)
    return "rank", pid


@ENGINES
@pytest.mark.parametrize(("work", "code"), [(come_back, 1), (raise_there, 1), (leave_by_exit, 7)])
def test_a_fork_that_goes_on_never_answers_for_its_rank(
    work: Callable[[Axis], Any], code: int, engine: str, pool: Pool
) -> None:
    ranks = pool(2, engine)

    def both(axis: Axis) -> tuple[str, int]:
        who, pid = work(axis)
        if who == "rank":
            return who, exit_code_of(pid)
        return who, 0

    assert ranks.run(both) == [("rank", code)] * 2
    for value in (1.0, 2.0):  # and no late answer is taken for that of a later call
        assert ranks.run(lambda axis, value=value: total(axis, value)) == [[2 * value] * 3] * 2


def test_a_fork_that_comes_back_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    def work(axis: Axis) -> int:
        pid = fork()
        return exit_code_of(pid) if pid else 0

    assert launch(work, degree=1) == [1]
    said = capfd.readouterr().err
    assert "is a fork of rank 0 (process " in said
    assert "has returned from the rank's function. Only the rank answers for it." in said


@ENGINES
def test_workers_of_a_data_loader_that_are_forks_are_fine(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> list[float]:
        data = TensorDataset(torch.arange(8.0))
        loader = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context="fork")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return [
                comm.all_reduce(x.sum().view(1), axis, direction="forward").item()
                for (x,) in loader
            ]

    assert pool(2, engine).run(work) == [[12.0, 44.0]] * 2


@ENGINES
def test_the_ranks_of_a_process_do_not_serve_its_forks(engine: str, pool: Pool) -> None:
    ranks = pool(2, engine)

    def attempt() -> str:
        said = refusal_of(lambda: ranks.run(total))
        ranks.close()
        return said

    said = said_by_fork(attempt)
    assert f"UsageError: these 2 ranks belong to process {os.getpid()}, and this one, " in said
    assert ranks.run(total) == [[2.0] * 3] * 2  # nor has the fork closed them


def test_a_fork_opens_ranks_of_its_own() -> None:
    launch(total, degree=2)
    assert said_by_fork(lambda: repr(launch(lambda axis: axis.rank, degree=2))) == "[0, 1]"


# Calls that are over ---------------------------------------------------------------------------


def test_an_axis_of_a_call_that_is_over_is_refused(pool: Pool) -> None:
    ranks = pool(2, "threads")

    def build(axis: Axis) -> tuple[Axis, nn.Module]:
        plain = nn.Linear(4, 6)
        layer = ColumnParallelLinear.from_linear(plain, axis=axis, gather_output=True)
        return axis, layer

    kept = ranks.run(build)
    axis, layer = kept[1]
    assert (axis.rank, axis.size, axis.transport.name) == (1, 2, "threads")
    message = "rank 1 of 2 cannot be reached here: the call of launch or Ranks.run that this axis"
    for attempt in (lambda: total(axis), lambda: layer(torch.ones(2, 4))):
        with pytest.raises(AxisError, match=message):
            attempt()

    def later(new: Axis) -> list[float]:
        with pytest.raises(AxisError, match="Make the model inside the function, on the axis"):
            total(kept[new.rank][0])
        return total(new)

    assert ranks.run(later) == [[2.0] * 3] * 2


def test_a_generator_that_communicates_after_the_call_is_refused(pool: Pool) -> None:
    def work(axis: Axis) -> Iterator[list[float]]:
        yield total(axis)

    first, _ = pool(2, "threads").run(work)
    with pytest.raises(AxisError, match="rank 0 of 2 cannot be reached here: the call of launch"):
        next(first)


def test_a_call_that_is_over_at_degree_1_has_nobody_to_disturb(pool: Pool) -> None:
    (axis,) = pool(1, "threads").run(lambda axis: axis)
    assert total(axis) == [1.0] * 3


@ENGINES
def test_what_ranks_return_shares_no_memory_with_another_rank(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> Tensor:
        return comm.all_reduce(torch.ones(3), axis, direction="forward")

    first, second = pool(2, engine).run(work)
    first.add_(1)
    assert (first.tolist(), second.tolist()) == ([3.0] * 3, [2.0] * 3)


# Two at a time ---------------------------------------------------------------------------------


def in_two_threads(axis: Axis, refused: Path) -> list[str]:
    """What rank 0 gets from the same sum in two of its threads; rank 1 comes when one is refused.

    Neither can be over before the other one begins.
    """
    if axis.rank:
        wait_for(refused)
        return [str(total(axis))]
    found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            found.put(str(total(axis)))
        except UsageError as error:
            found.put(f"UsageError: {error}")
            refused.touch()

    thread = threading.Thread(target=attempt)
    thread.start()
    attempt()
    thread.join()
    return sorted([found.get(), found.get()])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody has made {path}"
        time.sleep(0.02)


def check_one_was_refused(found: list[list[str]]) -> None:
    said = "two threads use one rank's transport at the same time"
    way_out = "Make all collectives of an axis in one thread of each rank"
    (refused, first), (second,) = found
    assert refused.startswith("UsageError: ")
    assert said in refused
    assert way_out in refused
    assert first == second == "[2.0, 2.0, 2.0]"


def test_a_second_thread_of_a_rank_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    check_one_was_refused(ranks.run(lambda axis: in_two_threads(axis, tmp_path / "refused")))
    assert ranks.run(total) == [[2.0] * 3] * 2


def test_a_second_thread_of_a_rank_is_refused_without_the_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c_modules, "shm", lambda: None)
    check_one_was_refused(launch(lambda axis: in_two_threads(axis, tmp_path / "refused"), degree=2))
