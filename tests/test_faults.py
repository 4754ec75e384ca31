"""A rank that is killed or stopped in the middle of an all-reduce, and ranks that disagree.

Real processes, over shared memory and over gloo, under `launch` and under torchrun. Whatever
happens to one rank, every other one ends, in time, and nothing is left behind.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import warm
from shardproof import c_modules, comm
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.errors import MismatchError, RankError
from shardproof.leaves import Cut
from shardproof.ranks import launch, open_ranks

SRC = Path(__file__).parents[1] / "src"
WITH_CORE = pytest.mark.skipif(
    c_modules.shm() is None, reason=f"needs the core: {c_modules.problem()}"
)

TIMEOUT = 4.0
# What is promised for a rank that is killed; one that is stopped is waited for before.
SOON = 10.0
LIMITS = {"SIGKILL": SOON, "SIGSTOP": TIMEOUT + SOON}


MESSAGES = {
    "SIGKILL": "rank 1 of 3 was killed by signal 9 (SIGKILL)",
    "SIGSTOP": "rank 1 of 3 was stopped by SIGSTOP and did not come within 4 s: ranks 0 and 2 wait "
    "in forward all_reduce of mlp.down: float32 (100000,)",
}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def in_shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*shardproof*")}


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """In /dev/shm, when the test is over; other tests may run beside it."""
    before = in_shared_memory()
    yield
    deadline = time.monotonic() + 30
    while in_shared_memory() - before:
        assert time.monotonic() < deadline, in_shared_memory() - before
        time.sleep(0.1)


# Under launch ----------------------------------------------------------------------------------


def all_reduce_until(
    signal_name: str, folder: Path, victim: int = 1, numel: int = 100_000
) -> Callable[[Axis], None]:
    """All-reduces without end, in one of which the victim is hit."""

    def work(axis: Axis) -> None:
        (folder / f"pid-{axis.rank}").write_text(str(os.getpid()))
        x = torch.ones(numel)
        comm.all_reduce(x, axis, direction="forward", who="mlp.down")

        def strike() -> None:
            (folder / "struck").write_text(str(time.time()))
            os.kill(os.getpid(), getattr(signal, signal_name))

        if axis.rank == victim:
            threading.Timer(0.5, strike).start()
        while True:
            comm.all_reduce(x, axis, direction="forward", who="mlp.down")

    return work


@pytest.mark.parametrize(
    ("signal_name", "transport"),
    [
        pytest.param("SIGKILL", "shm", marks=WITH_CORE),
        ("SIGKILL", "gloo"),
        # Whether a process is stopped its parent alone can ask.
        pytest.param("SIGSTOP", "gloo", marks=pytest.mark.fresh_ranks),
    ],
)
@pytest.mark.usefixtures("nothing_is_left")
def test_launch_ends_all_ranks_and_names_the_one(
    signal_name: str, transport: str, tmp_path: Path
) -> None:
    work = all_reduce_until(signal_name, tmp_path)
    with pytest.raises(RankError) as caught:
        launch(work, degree=3, engine="processes", threads=1, timeout=TIMEOUT, transport=transport)
    took = time.time() - float((tmp_path / "struck").read_text())
    assert took < LIMITS[signal_name]
    assert caught.value.rank == 1
    assert str(caught.value) == MESSAGES[signal_name]
    assert not [pid for pid in pids_in(tmp_path) if is_alive(pid)]


def pids_in(folder: Path) -> list[int]:
    pids = [int(path.read_text()) for path in sorted(folder.glob("pid-*"))]
    assert pids
    return pids


# Under torchrun --------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import RankError

folder = Path(sys.argv[1])
axis = Axis.from_env(transport="gloo", timeout={timeout})
(folder / f"pid-{{axis.rank}}").write_text(str(os.getpid()))
x = torch.ones(100_000)

def strike():
    (folder / "struck").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)

comm.all_reduce(x, axis, direction="forward", who="mlp.down")
if axis.rank == 1:
    threading.Timer(0.5, strike).start()
try:
    while True:
        comm.all_reduce(x, axis, direction="forward", who="mlp.down")
except RankError as error:
    (folder / f"error-{{axis.rank}}").write_text(f"{{time.time()}} {{error.rank}} {{error}}")
    raise
"""


@pytest.mark.usefixtures("nothing_is_left")
def test_torchrun_ends_all_other_ranks(tmp_path: Path) -> None:
    """A rank that is stopped; what others say of one that is killed is in test_shared_faults.py."""
    (tmp_path / "script.py").write_text(SCRIPT.format(timeout=TIMEOUT))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = warm.Process(
        [*torchrun, "--nproc-per-node=2", "script.py", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )
    try:
        took = seconds_until_the_other_ended(process, tmp_path)
    finally:
        # torchrun is patient with a rank that is stopped; that is not what is measured here.
        for path in tmp_path.glob("pid-1"):
            if is_alive(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)
        output = "".join(process.communicate(timeout=120))
    assert took < LIMITS["SIGSTOP"], output
    assert process.returncode == 1
    assert not [pid for pid in pids_in(tmp_path) if is_alive(pid)]
    check_what_the_other_said(tmp_path, output)


def seconds_until_the_other_ended(process: warm.Process, folder: Path) -> float:
    struck = folder / "struck"
    deadline = time.monotonic() + 120
    while not (struck.exists() and struck.read_text()):
        assert time.monotonic() < deadline, "the ranks did not come so far"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    other = int((folder / "pid-0").read_text())
    while is_alive(other):
        assert time.monotonic() < deadline, "a rank waits for ever"
        time.sleep(0.02)
    return time.time() - float(struck.read_text())


def check_what_the_other_said(folder: Path, output: str) -> None:
    when, _, message = (folder / "error-0").read_text().split(" ", 2)
    assert float(when) - float((folder / "struck").read_text()) < LIMITS["SIGSTOP"], output
    assert re.search("timed out|timeout", message, re.IGNORECASE), message


# Disagreement ----------------------------------------------------------------------------------


def other_dtype(axis: Axis) -> None:
    dtype = torch.float64 if axis.rank == 1 else torch.float32
    comm.all_reduce(torch.ones(3, dtype=dtype), axis, direction="forward", who="mlp.down")


def other_shape(axis: Axis) -> None:
    numel = 4 if axis.rank == 1 else 3
    comm.all_reduce(torch.ones(numel), axis, direction="forward", who="mlp.down")


def other_kind(axis: Axis) -> None:
    if axis.rank == 1:
        cut = Cut(3, 3, axis.size)
        comm.all_gather(torch.ones(1), axis, dim=0, cut=cut, direction="forward", who="mlp.down")
    else:
        comm.all_reduce(torch.ones(3), axis, direction="forward", who="mlp.down")


DISAGREEMENTS = [
    (other_dtype, "all_reduce of mlp.down: float64 (3,)"),
    (other_shape, "all_reduce of mlp.down: float32 (4,)"),
    (other_kind, "all_gather of mlp.down: float32 (3,)"),
]
PLACES = [
    pytest.param(("threads", "threads"), id="threads"),
    pytest.param(("processes", "shm"), id="shm", marks=WITH_CORE),
    pytest.param(("processes", "gloo"), id="gloo"),
]


@pytest.fixture(scope="module", params=PLACES)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    engine, transport = request.param
    with open_ranks(3, engine, threads=1, timeout=60.0, transport=transport) as opened:
        yield opened


@pytest.mark.parametrize(
    ("disagree", "other"), DISAGREEMENTS, ids=[each.__name__ for each, _ in DISAGREEMENTS]
)
def test_ranks_that_disagree_all_raise_and_name_both_sides(
    disagree: Callable[[Axis], None], other: str, ranks: Ranks
) -> None:
    def work(axis: Axis) -> tuple[str, list[float]]:
        with pytest.raises(MismatchError) as caught:
            disagree(axis)
        # Nobody is left behind: the next collective is as good as any.
        x = comm.all_reduce(torch.full((2,), axis.rank + 1.0), axis, direction="forward")
        return str(caught.value), x.tolist()

    found = ranks.run(work)
    assert found == [found[0]] * 3
    message, after = found[0]
    assert after == [6.0, 6.0]
    assert message.startswith("the ranks disagree about one collective. ")
    assert "ranks 0 and 2: forward all_reduce of mlp.down: float32 (3,)" in message
    assert f"rank 1: forward {other}" in message
