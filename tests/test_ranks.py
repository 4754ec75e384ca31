"""Ranks as threads and as processes: results, bad input, and every way in which a rank can fail."""

import atexit
import copy
import gc
import importlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from places import CARRIER
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.engines.status import StatusFile
from shardproof.errors import (
    DegreeError,
    LayoutError,
    MismatchError,
    RankError,
    ShapeError,
    UsageError,
)
from shardproof.numerics import mode
from shardproof.plans.apply import parallelize
from shardproof.ranks import ENGINES, launch, open_ranks
from shardproof.transport.base import Call

Pool = Callable[[int, str], Ranks]
SRC = Path(__file__).parents[1] / "src"
BOTH = pytest.mark.parametrize("engine", ENGINES)
SUM = Call("all_reduce", "forward", "mlp.down", (3,), torch.float32)


def add_up(axis: Axis, call: Call = SUM) -> Tensor:
    return axis.transport.all_reduce(torch.ones(3), call=call)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# What ranks do ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_results_come_in_rank_order(engine: str, degree: int, pool: Pool) -> None:
    def work(axis: Axis) -> tuple[int, int, str]:
        time.sleep(0.02 * (axis.size - axis.rank))  # the last rank is the first to return
        return axis.rank, axis.size, axis.name

    assert pool(degree, engine).run(work) == [(rank, degree, "tp") for rank in range(degree)]


@BOTH
def test_closures_and_lambdas_travel_and_tensors_come_back(engine: str, pool: Pool) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    rows = pool(2, engine).run(lambda axis: {"row": weight[axis.rank], "t": weight.t()})

    assert [found["row"].tolist() for found in rows] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert torch.equal(rows[1]["t"], weight.t())


@BOTH
def test_every_call_has_a_new_axis_with_an_empty_ledger(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, dict[str, Any]]:
        before = axis.transport.ledger.as_dict()
        axis.transport.ledger.add("forward", "all_reduce", message_bytes=1, sent_bytes=1)
        return axis.next_name("linear"), before

    for _ in range(2):
        assert pool(2, engine).run(work) == [("linear-0", {})] * 2


def test_processes_stay_for_the_next_call(pool: Pool) -> None:
    ranks = pool(2, "processes")
    first = ranks.run(lambda axis: os.getpid())
    assert ranks.run(lambda axis: os.getpid()) == first
    assert len({*first, os.getpid()}) == 3


def test_threads_stay_for_the_next_call(pool: Pool) -> None:
    ranks = pool(2, "threads")
    first = ranks.run(lambda axis: threading.get_ident())
    assert ranks.run(lambda axis: threading.get_ident()) == first


@BOTH
@pytest.mark.parametrize("degree", [1, 3])
def test_ranks_say_what_they_are(engine: str, degree: int, pool: Pool) -> None:
    ranks = pool(degree, engine)
    several = {"threads": "threads", "processes": CARRIER}[engine]
    assert (ranks.engine, ranks.degree) == (engine, degree)
    assert ranks.transport == (several if degree > 1 else "solo")
    assert ranks.run(lambda axis: axis.transport.name) == [ranks.transport] * degree


def test_launch_takes_numpy_integers() -> None:
    assert launch(lambda axis: axis.rank, degree=np.int64(2)) == [0, 1]


@BOTH
@pytest.mark.parametrize("degree", [1, 2])
def test_a_rank_has_its_own_number_of_threads(engine: str, degree: int, pool: Pool) -> None:
    def work(axis: Axis) -> tuple[int, int]:
        first = torch.get_num_threads()
        (torch.ones(300, 300) @ torch.ones(300, 300)).exp()  # large enough for several threads
        return first, torch.get_num_threads()

    assert pool(degree, engine).run(work) == [(1, 1)] * degree  # the pool asks for 1


def test_the_callers_number_of_threads_stays() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = []
    try:
        assert launch(lambda axis: torch.get_num_threads(), degree=2, threads=3) == [3, 3]
        found.append(torch.get_num_threads())
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [2, 2], "here, and in a thread that was started later"


def test_by_default_ranks_have_one_thread_at_every_degree() -> None:
    """torch's own linear may have other bits with another number."""
    for degree in (1, 3):
        assert launch(lambda axis: torch.get_num_threads(), degree=degree) == [1] * degree


def test_what_is_not_cut_has_the_same_bits_at_every_degree_by_default() -> None:
    first, up, down = nn.Linear(30, 30), nn.Linear(30, 64), nn.Linear(64, 30)
    plain = nn.Sequential(first, up, nn.GELU(), down)
    x = torch.randn(10, 30)

    def work(axis: Axis) -> Tensor:
        model = parallelize(copy.deepcopy(plain), {"1": "colwise", "3": "rowwise"}, axis)
        return model(x).detach()

    outputs = [y for degree in (1, 2, 3) for y in launch(work, degree=degree)]
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@BOTH
def test_autograd_runs_on_every_rank_and_may_communicate(engine: str, pool: Pool) -> None:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
            ctx.axis = axis
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
            call = Call("all_reduce", "backward", "sum", tuple(grad_y.shape), grad_y.dtype)
            return ctx.axis.transport.all_reduce(grad_y.contiguous(), call=call), None

    def work(axis: Axis) -> list[float]:
        linear = nn.Linear(3, 1, bias=False)
        nn.init.constant_(linear.weight, axis.rank + 1.0)
        x = torch.ones(3, requires_grad=True)
        Sum.apply(x, axis).mul(linear.weight).sum().backward()
        assert linear.weight.grad is not None
        return x.grad.tolist()

    assert pool(3, engine).run(work) == [[6.0] * 3] * 3


def test_backward_stays_in_the_threads_of_ranks(pool: Pool) -> None:
    found = pool(2, "threads").run(lambda axis: torch._C._is_multithreading_enabled())
    assert found == [False, False]
    assert torch._C._is_multithreading_enabled()


def test_two_axes_live_in_one_process() -> None:
    """Every rank of an outer axis has an inner axis of its own."""

    def outer(axis: Axis) -> list[float]:
        mine = torch.full((1,), 10.0**axis.rank)

        def inner(small: Axis) -> float:
            call = Call("all_reduce", "forward", "inner", (1,), torch.float32)
            return small.transport.all_reduce(mine * (small.rank + 1), call=call).item()

        sums = launch(inner, degree=3)
        call = Call("all_reduce", "forward", "outer", (3,), torch.float32)
        return axis.transport.all_reduce(torch.tensor(sums), call=call).tolist()

    assert launch(outer, degree=2) == [[66.0] * 3] * 2


def test_processes_have_the_launchers_modes_and_their_own_place(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[object, ...]:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
        return mode.set_blas_mode(), [os.environ[name] for name in names], sys.stdin.read()

    state = mode.set_blas_mode()
    for rank, (branch, place, stdin) in enumerate(pool(2, "processes").run(work)):
        assert (branch.setting, branch.branch, branch.problem) == (
            state.setting,
            state.branch,
            state.problem,
        )
        assert place == [str(rank), str(rank), "2", "2", "1"]
        assert stdin == ""


@pytest.mark.fresh_ranks
def test_processes_import_what_the_caller_can_and_print_where_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "found_by_the_caller_alone.py").write_text("WORD = 'hello'")
    monkeypatch.syspath_prepend(tmp_path)

    def work(axis: Axis) -> None:
        print(importlib.import_module("found_by_the_caller_alone").WORD)  # noqa: T201
        print("trouble", file=sys.stderr)  # noqa: T201

    with open_ranks(1, "processes") as ranks:  # started now, while the output is captured
        ranks.run(work)
        out, err = capfd.readouterr()
    assert out == "hello\n"
    assert "trouble\n" in err


# Bad input -------------------------------------------------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)


@BOTH
@pytest.mark.parametrize(
    ("degree", "message"),
    [
        (0, "degree 0 is not a positive number"),
        (-2, "degree -2 is not a positive number"),
        (2.0, "degree 2.0 is not a whole number"),
        ("2", "degree '2' is not a whole number"),
        (True, "degree True is not a whole number"),
        (None, "degree None is not a whole number"),
    ],
)
@pytest.mark.usefixtures("nothing_starts")
def test_a_degree_that_makes_no_sense_is_refused(engine: str, degree: Any, message: str) -> None:
    with pytest.raises(DegreeError, match=message):
        launch(lambda axis: None, degree=degree, engine=engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "mpi"}, r"unknown engine 'mpi'. Use one of: threads, processes."),
        ({"threads": 0}, "threads=0 is not a positive whole number"),
        ({"threads": 1.5}, "threads=1.5 is not a positive whole number"),
        ({"timeout": 0}, "timeout=0 is not a positive number of seconds"),
        ({"timeout": math.nan}, "timeout=nan is not a positive number of seconds"),
        ({"timeout": math.inf}, "timeout=inf is not a positive number of seconds"),
        ({"timeout": None}, "timeout=None is not a positive number of seconds"),
    ],
)
@pytest.mark.usefixtures("nothing_starts")
def test_an_option_that_makes_no_sense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launch(lambda axis: None, degree=2, **options)


@BOTH
@pytest.mark.usefixtures("nothing_starts")
def test_what_is_not_callable_is_refused(engine: str) -> None:
    with pytest.raises(UsageError, match="cannot launch 3: it is not callable"):
        launch(3, degree=2, engine=engine)  # type: ignore[arg-type]


def test_a_function_that_cannot_be_pickled_is_named_and_breaks_nothing(pool: Pool) -> None:
    lock = threading.Lock()
    ranks = pool(2, "processes")

    def holds_a_lock(axis: Axis) -> bool:
        return lock.locked()

    with pytest.raises(UsageError, match=r"the function .*holds_a_lock cannot be pickled.*lock"):
        ranks.run(holds_a_lock)
    assert ranks.run(lambda axis: axis.rank) == [0, 1]


def test_a_result_that_cannot_be_unpickled_is_named_and_breaks_nothing(pool: Pool) -> None:
    ranks = pool(2, "processes")

    def work(axis: Axis) -> Any:
        class Trap:
            def __reduce__(self):
                return int, ("not a number",)

        return Trap() if axis.rank else None

    with pytest.raises(UsageError, match="the result of rank 1 cannot be unpickled: ValueError"):
        ranks.run(work)
    assert ranks.run(lambda axis: axis.rank) == [0, 1]


def test_closed_ranks_say_so() -> None:
    ranks = open_ranks(1, "threads")
    ranks.close()
    ranks.close()
    with pytest.raises(RankError, match="cannot run anything more: they were closed"):
        ranks.run(lambda axis: None)


def test_busy_ranks_say_so_instead_of_waiting_for_themselves() -> None:
    with open_ranks(2, "threads") as ranks:

        def work(axis: Axis) -> str:
            with pytest.raises(UsageError, match="these 2 ranks are busy") as caught:
                ranks.run(lambda inner: None)
            return type(caught.value).__name__

        assert ranks.run(work) == ["UsageError"] * 2


# A rank fails ----------------------------------------------------------------------------------


def raise_value_error(axis: Axis) -> None:
    if axis.rank == 1:
        raise ValueError("bad luck")
    add_up(axis)


def raise_our_own(axis: Axis) -> None:
    if axis.rank == 1:
        raise ShapeError("cannot split 7 over 3")
    add_up(axis)


def return_early(axis: Axis) -> None:
    if axis.rank != 1:
        add_up(axis)


def return_after_one(axis: Axis) -> None:
    add_up(axis)
    if axis.rank != 1:
        add_up(axis)


def call_exit(axis: Axis) -> None:
    if axis.rank == 1:
        sys.exit(3)
    add_up(axis)


def disagree(axis: Axis) -> None:
    add_up(axis, SUM if axis.rank else Call("all_reduce", "forward", "mlp.up", (4,), torch.float32))


def be_killed(axis: Axis) -> None:
    if axis.rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(60)
    add_up(axis)


def leave_the_process(axis: Axis) -> None:
    if axis.rank == 1:
        os._exit(0)
    add_up(axis)


def raise_while_others_compute(axis: Axis) -> None:
    if axis.rank == 1:
        raise ValueError("bad luck")
    while True:
        time.sleep(0.01)


def wrap_the_symptom(axis: Axis) -> None:
    if axis.rank == 1:
        time.sleep(0.3)
        raise ValueError("bad luck")
    try:
        add_up(axis)
    except RankError as error:
        raise KeyError("something else") from error


WAITS = r"forward all_reduce of mlp\.down: float32 \(3,\)"
FAILURES = [
    (raise_value_error, RankError, r"^rank 1 of N raised ValueError: bad luck\n\nTraceback"),
    (raise_our_own, ShapeError, r"^cannot split 7 over 3$"),
    (return_early, RankError, rf"^rank 1 of N returned and will not come: ranks? .* in {WAITS}"),
    (return_after_one, RankError, rf"^rank 1 of N returned and will not come: .* in {WAITS}"),
    (call_exit, RankError, r"^rank 1 of N left early: it called sys.exit\(3\)"),
    (disagree, MismatchError, r"rank 0: .*mlp\.up.*; ranks 1 and 2: forward all_reduce of mlp\.d"),
    (raise_while_others_compute, RankError, r"^rank 1 of N raised ValueError: bad luck"),
    (wrap_the_symptom, RankError, r"^rank 1 of N raised ValueError: bad luck"),
]
FATAL = [
    (be_killed, RankError, r"^rank 1 of N was killed by signal 9 \(SIGKILL\)$"),
    (leave_the_process, RankError, r"^rank 1 of N left early: its process ended with exit code 0$"),
]


def named(failures: list[Any]) -> list[Any]:
    return [pytest.param(*failure, id=failure[0].__name__) for failure in failures]


@pytest.mark.parametrize(("work", "kind", "message"), named(FAILURES))
def test_a_thread_that_fails_ends_all(work: Any, kind: type[Exception], message: str) -> None:
    check_failure("threads", 3, work, kind, message)


@pytest.mark.parametrize(("work", "kind", "message"), named(FAILURES[:3] + FATAL))
def test_a_process_that_fails_ends_all(work: Any, kind: type[Exception], message: str) -> None:
    check_failure("processes", 2, work, kind, message)


def leave_work_for_the_end(axis: Axis, folder: Path) -> None:
    def later() -> None:
        time.sleep(0.3)
        (folder / f"thread {axis.rank}").touch()
        sys.stdout.write(f"printed at last {axis.rank}")

    atexit.register((folder / f"exit {axis.rank}").touch)
    threading.Thread(target=later).start()


@pytest.mark.fresh_ranks
def test_a_process_does_what_was_left_for_its_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is printed waits to be written
    launch(partial(leave_work_for_the_end, folder=tmp_path), degree=1, engine="processes")
    found = sorted(each.name for each in tmp_path.iterdir())
    assert found == ["exit 0", "thread 0"]
    assert capfd.readouterr().out == "printed at last 0"


def start_a_child(axis: Axis) -> tuple[int, int]:
    """What a DataLoader does, for one; the child must not outlive the ranks."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    child.returncode = 0  # nobody here waits for it
    return os.getpid(), child.pid


def check_failure(engine: str, degree: int, work: Any, kind: type[Exception], message: str) -> None:
    message = message.replace("of N", f"of {degree}")
    with open_ranks(degree, engine, threads=1, timeout=60.0) as ranks:
        pids: list[int] = []
        if engine == "processes":
            pids = [pid for both in ranks.run(start_a_child) for pid in both]
            assert all(map(is_alive, pids))
        started = time.monotonic()
        with pytest.raises(kind) as caught:
            ranks.run(work)
        assert time.monotonic() - started < 10
        assert type(caught.value) is kind
        assert re.search(message, str(caught.value))  # `match` would look at the notes too
        if isinstance(caught.value, RankError):
            assert caught.value.rank == 1
        with pytest.raises(RankError, match="cannot run anything more: a call on them failed"):
            ranks.run(lambda axis: None)
        check_nothing_is_left(ranks, engine, pids)


def check_nothing_is_left(ranks: Any, engine: str, pids: list[int]) -> None:
    if engine == "threads":
        wait_until(lambda: not any(t.is_alive() for t in ranks._threads), seconds=10)
    else:
        assert pids
        wait_until(lambda: not any(map(is_alive, pids)), seconds=1)
        assert not ranks._folder.exists()


def test_the_cause_is_chained_and_has_the_ranks_traceback() -> None:
    with pytest.raises(RankError) as caught:
        launch(raise_value_error, degree=2)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "in raise_value_error" in str(caught.value)
    assert "shardproof/engines" not in str(caught.value), (
        "the traceback begins in the user's function"
    )

    with pytest.raises(ShapeError) as caught_own:
        launch(raise_our_own, degree=2)
    (note,) = caught_own.value.__notes__
    assert note == "This was raised on rank 1 of 2."  # the traceback is the error's own
    assert "raise_our_own" in "".join(traceback.format_tb(caught_own.tb))


def test_when_all_raise_the_same_that_is_raised() -> None:
    def work(axis: Axis) -> None:
        raise LayoutError("saved at degree 4")

    with pytest.raises(LayoutError) as caught:
        launch(work, degree=3)
    assert str(caught.value) == "saved at degree 4"
    assert "rank 0 of 3" in caught.value.__notes__[0]


@BOTH
def test_a_timeout_names_who_is_missing_and_where_the_others_wait(engine: str) -> None:
    def work(axis: Axis) -> None:
        add_up(axis)
        if axis.rank == 1:
            time.sleep(3 if engine == "threads" else 60)
        add_up(axis)

    with pytest.raises(RankError) as caught:
        launch(work, degree=3, engine=engine, threads=1, timeout=1.0)
    assert str(caught.value) == (
        "rank 1 of 3 did not come within 1 s: ranks 0 and 2 wait in "
        "forward all_reduce of mlp.down: float32 (3,)"
    )
    assert caught.value.rank == 1


def test_a_thread_that_cannot_be_ended_is_given_up() -> None:
    release = threading.Event()

    def work(axis: Axis) -> None:
        if axis.rank == 1:
            raise ValueError("bad luck")
        release.wait(60)

    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2 raised ValueError") as caught:
        launch(work, degree=2)
    assert time.monotonic() - started < 10
    release.set()
    assert "given up: ranks [0]" in caught.value.__notes__[0]


def test_a_process_that_sends_nothing_waits_for_the_others() -> None:
    """gloo itself would let it return, although nobody comes."""

    def work(axis: Axis) -> None:
        call = Call("exchange", "forward", "alone", (), torch.float32)
        if axis.rank == 0:
            nothing = torch.empty(0)
            axis.transport.exchange([[], []], [[], []], rounds=0, like=nothing, call=call)

    with open_ranks(2, "processes", threads=1, transport="gloo") as ranks:
        match = r"rank 1 of 2 returned and will not come: rank 0 waits in forward exchange"
        with pytest.raises(RankError, match=match):
            ranks.run(work)
        assert not ranks.is_usable


def test_errors_that_cannot_travel_are_told_in_words() -> None:
    def work(axis: Axis) -> None:
        class OddError(Exception):
            def __init__(self, one: int, two: int) -> None:
                super().__init__("odd")
                self.lock = threading.Lock()

        raise OddError(1, 2)

    with pytest.raises(
        RankError, match=r"^rank 0 of 1 raised OddError: odd\n\nTraceback"
    ) as caught:
        launch(work, degree=1, engine="processes")
    assert caught.value.__cause__ is None


def test_a_result_that_cannot_be_pickled_is_named() -> None:
    with pytest.raises(UsageError, match="the result of rank 0, of type generator, cannot be pick"):
        launch(lambda axis: (x for x in "ab"), degree=1, engine="processes")


# The caller ------------------------------------------------------------------------------------


@BOTH
def test_an_interrupt_of_the_caller_ends_all(engine: str) -> None:
    def work(axis: Axis) -> None:
        if axis.rank == 1:
            while True:
                time.sleep(0.01)
        add_up(axis)

    with open_ranks(2, engine, threads=1, timeout=60.0) as ranks:
        pids = ranks.run(lambda axis: os.getpid())
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ranks.run(work)
        timer.join()
        check_nothing_is_left(ranks, engine, pids)


@pytest.mark.fresh_ranks  # else a server of forks would be started for this environment
def test_processes_start_with_the_environment_that_they_are_given() -> None:
    given = os.environ | {"SHARDPROOF_BLAS": "off", "PLANTED": "yes", "RANK": "7"}
    with open_ranks(1, "processes", environment=given) as ranks:
        names = ("PLANTED", "SHARDPROOF_BLAS", "MKL_CBWR", "RANK")
        found = ranks.run(lambda axis: [os.environ.get(name) for name in names])
    assert found == [["yes", "off", given.get("MKL_CBWR"), "0"]]
    with pytest.raises(UsageError, match=r"environment= is for engine='processes': threads have"):
        open_ranks(1, "threads", environment=given)


@pytest.mark.fresh_ranks
def test_forgotten_ranks_are_ended() -> None:
    ranks: Any = open_ranks(1, "processes")
    (pid,), folder = ranks.run(lambda axis: os.getpid()), ranks._folder
    assert is_alive(pid)
    assert folder.stat().st_mode & 0o777 == 0o700
    del ranks
    gc.collect()
    assert not is_alive(pid)
    assert not folder.exists()


SCRIPT = """
import os, sys, time
from shardproof.ranks import open_ranks

class Answer:
    def __init__(self, rank):
        self.rank = rank

def helper(axis):
    return Answer(axis.rank)

def work(axis):
    return helper(axis)

ranks = open_ranks(2, "processes", threads=1)
assert [isinstance(a, Answer) and a.rank for a in ranks.run(work)] == [0, 1]
print(*ranks.run(lambda axis: os.getpid()), ranks._folder, flush=True)
ranks.run(lambda axis: time.sleep(60))
"""


def test_a_script_from_standard_input_runs_and_its_death_ends_all() -> None:
    """As in a notebook, what the ranks run is defined nowhere but in `__main__`."""
    process = subprocess.Popen(
        [sys.executable, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SRC)},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin as script, process.stdout as output:
        script.write(SCRIPT)
        script.close()
        *pids, folder = output.readline().split()
        assert len(pids) == 2
        assert all(is_alive(int(pid)) for pid in pids)
        time.sleep(0.5)  # now the ranks are inside a call
        process.kill()
        wait_until(lambda: not any(is_alive(int(pid)) for pid in pids), seconds=10)
        wait_until(lambda: not Path(folder).exists(), seconds=10)


# The board -------------------------------------------------------------------------------------


def test_the_board_tells_where_each_rank_is(tmp_path: Path) -> None:
    board = StatusFile.create(tmp_path / "board", 2)
    other = StatusFile(tmp_path / "board")
    board.begin(1, 1, "first")
    board.end(1)
    board.begin(1, 5, "x" * 5000)
    place = other.read(1)
    assert (place.begun, place.ended, place.is_waiting) == (5, 1, True)
    assert place.text == "x" * 1000
    assert other.read(0).text == ""
    assert not other.read(0).is_waiting
