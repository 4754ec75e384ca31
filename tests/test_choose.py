"""Which transport serves a process group: chosen alike on all ranks, named, and let go of."""

import gc
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import warm
from places import CARRIER, Pool
from shardproof import c_modules, comm
from shardproof.axis import Axis
from shardproof.cli.doctor import transports
from shardproof.errors import MismatchError, ShardproofError, UsageError
from shardproof.ranks import open_ranks
from shardproof.transport.choose import choose, shm_problem
from shardproof.transport.distributed import DistributedTransport

SRC = Path(__file__).parents[1] / "src"
WITH_CORE = pytest.mark.skipif(
    c_modules.shm() is None, reason=f"needs the core: {c_modules.problem()}"
)


def add_up(axis: Axis) -> list[float]:
    return comm.all_reduce(torch.full((2,), axis.rank + 1.0), axis, direction="forward").tolist()


def outcome_of(make: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(ShardproofError) as caught:
        make()
    return type(caught.value).__name__, str(caught.value)


def test_the_core_is_there_where_a_compiler_is() -> None:
    """Without this, a broken build would only make tests skip."""
    if os.environ.get(c_modules.VARIABLE) == "off":
        pytest.skip(f"{c_modules.VARIABLE}=off")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None or not header.exists() or sys.platform != "linux":
        pytest.skip(f"no compiler {compiler!r}, no {header}, or no Linux")
    assert c_modules.problem() is None
    assert shm_problem() is None


def test_auto_and_names(pool: Pool) -> None:
    def work(axis: Axis) -> list[tuple[str, str]]:
        world = dist.group.WORLD
        found = [Axis.from_group(world, transport=name) for name in ("auto", "gloo")]
        assert [add_up(each) for each in found] == [[3.0, 3.0]] * 2
        return [(each.transport.name, each.transport_note) for each in found]

    wanted = [(CARRIER, ""), ("gloo", "asked for by name")]
    found = pool(2, "processes").run(work)
    if CARRIER == "shm":
        assert found == [wanted] * 2
    else:
        assert [each[1] for each in found] == [wanted[1]] * 2
        assert all(
            "shared memory is not used: rank 0 of 2 cannot" in note for (_, note), _ in found
        )


def test_what_cannot_be_had_by_name_is_an_error_on_all_ranks(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[tuple[str, str], ...]:
        world = dist.group.WORLD
        nccl = outcome_of(lambda: Axis.from_group(world, transport="nccl"))
        if axis.rank == 1:  # as on a machine without a compiler, and on one rank alone
            c_modules.shm, there = (lambda: None), c_modules.shm
            c_modules.problem, why = (lambda: "there was no compiler"), c_modules.problem
        try:
            shm = outcome_of(lambda: Axis.from_group(world, transport="shm"))
            note = Axis.from_group(world).transport_note
        finally:
            if axis.rank == 1:
                c_modules.shm, c_modules.problem = there, why
        return nccl, shm, ("note", note)

    (first, second) = pool(2, "processes").run(work)
    assert first == second
    nccl, shm, (_, note) = first
    assert nccl == (
        "UsageError",
        "transport='nccl' cannot be used: the process group is one of gloo. Use "
        "transport='auto', or make another group with torch.distributed.new_group(backend=...).",
    )
    assert shm[0] == "UsageError"
    assert note.startswith("shared memory is not used: rank ")
    if CARRIER == "shm":
        assert shm[1] == (
            "transport='shm' cannot be used: rank 1 of 2 cannot share memory: there was no "
            "compiler. Use transport='auto', which takes gloo then and says so."
        )


def test_threads_without_the_core_say_that_they_wait_in_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(c_modules, "shm", lambda: None)
    monkeypatch.setattr(c_modules, "problem", lambda: "there was no compiler")
    note = "ranks wait in Python: there was no compiler"
    with open_ranks(2, engine="threads") as ranks:
        assert ranks.transport_note == note
        assert ranks.run(lambda axis: axis.transport_note) == [note] * 2
    with open_ranks(1, engine="threads") as ranks:
        assert ranks.transport_note == ""
    (why,) = (each["why"] for each in transports() if each["name"] == "threads")
    assert why == f"ranks are threads of one process; {note}"


@WITH_CORE
def test_threads_with_the_core_have_nothing_to_say(pool: Pool) -> None:
    assert pool(2, "threads").run(lambda axis: axis.transport_note) == [""] * 2
    (why,) = (each["why"] for each in transports() if each["name"] == "threads")
    assert why == "ranks are threads of one process"


def test_ranks_that_ask_for_different_transports_all_raise(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, str]:
        asked = "gloo" if axis.rank else "auto"
        return outcome_of(lambda: Axis.from_group(dist.group.WORLD, transport=asked))

    message = (
        "the ranks ask for different transports. rank 0: 'auto'; rank 1: 'gloo'. Ask for the same "
        "on all ranks."
    )
    assert pool(2, "processes").run(work) == [(MismatchError.__name__, message)] * 2


def test_a_group_of_another_backend_stays_as_it_is() -> None:
    class Nccl(DistributedTransport):
        def __init__(self) -> None:
            self.name, self.rank, self.size = "nccl", 0, 2

    base = Nccl()
    for asked in ("auto", "nccl"):
        choice = choose(base, asked, timeout=None)
        assert choice.transport is base
        assert choice.note == ""
    for asked in ("shm", "gloo"):
        with pytest.raises(UsageError, match=f"transport='{asked}' cannot be used: .* of nccl"):
            choose(base, asked, timeout=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "smh"}, r"unknown transport 'smh'. Use one of: auto, shm, gloo, nccl\."),
        ({"transport": "threads"}, r"unknown transport 'threads'. Use one of: auto, shm, gloo, n"),
        ({"transport": 3}, "unknown transport 3. Use one of"),
        ({"timeout": 0}, "timeout=0 is not a positive number of seconds"),
        ({"timeout": True}, "timeout=True is not a positive number of seconds"),
        ({"timeout": "5"}, "timeout='5' is not a positive number of seconds"),
        ({"timeout": float("inf")}, "timeout=inf is not a positive number of seconds"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_anything(
    options: Any, message: str
) -> None:
    for make in (Axis.from_env, lambda **given: Axis.from_group(None, **given)):
        with pytest.raises(UsageError, match=message):
            make(**options)
    assert not dist.is_initialized()


@WITH_CORE
def test_two_axes_of_one_group_do_not_mix(pool: Pool) -> None:
    def work(axis: Axis) -> list[list[float]]:
        first, second = (Axis.from_group(dist.group.WORLD) for _ in range(2))
        found = []
        for turn in range(40):  # in another rhythm on each, and with sums on their way
            axes = [first] * (turn % 3) + [second] * (turn % 4) + [axis]
            found += [add_up(each) for each in axes]
        a, b = torch.ones(3), torch.full((3,), 2.0)
        one = comm.start_all_reduce(a, first, direction="forward")
        two = comm.start_all_reduce(b, second, direction="forward")
        return [*found, two.wait().tolist()[:2], one.wait().tolist()[:2]]

    for found in pool(3, "processes").run(work):
        assert found[:-2] == [[6.0, 6.0]] * (len(found) - 2)
        assert found[-2:] == [[6.0, 6.0], [3.0, 3.0]]


def open_things() -> tuple[int, int]:
    """Files of this process, and memory that it shares with others."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    shared = [line for line in maps if " rw-s " in line and "shardproof" in line]
    return len(os.listdir("/proc/self/fd")), len(shared)


@WITH_CORE
def test_memory_and_files_go_with_the_axis(pool: Pool) -> None:
    def work(axis: Axis) -> list[tuple[int, int]]:
        gc.collect()
        counts = [open_things()]
        axes = [Axis.from_group(dist.group.WORLD) for _ in range(3)]
        for each in axes:
            add_up(each)
        counts.append(open_things())
        del axes, each
        gc.collect()
        return [*counts, open_things()]

    for before, during, after in pool(2, "processes").run(work):
        assert during[0] > before[0]
        assert during[1] == before[1] + 3
        assert after == before


CLOSING = """
import sys, torch, torch.distributed as dist
from shardproof import comm
from shardproof.axis import Axis

rank, store, order = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
axis = Axis.from_group(dist.group.WORLD)
x = torch.ones(3)
comm.all_reduce(x, axis, direction="forward")
if order == "axis first":
    del axis
if order != "never":
    dist.destroy_process_group()
if order == "group first" and axis.transport.name == "shm":
    comm.all_reduce(x, axis, direction="forward")  # it does not need the group any more
"""


@pytest.mark.parametrize("order", ["axis first", "group first", "never"])
def test_axis_and_group_may_end_in_any_order(order: str, tmp_path: Path) -> None:
    ranks = [
        warm.Process(
            [sys.executable, "-c", CLOSING, str(rank), str(tmp_path / "store"), order],
            env=os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
