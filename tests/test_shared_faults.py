"""Ranks that die, stop, are interrupted or refuse, over shared memory: the others end and say who.

Every rank is a process that a test starts, and ends.
"""

import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm
from shardproof import c_modules

pytestmark = pytest.mark.skipif(c_modules.shm() is None, reason="the C core was not built")

_BEGIN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job it is ignored
from datetime import timedelta
import torch
import torch.distributed as dist
from shardproof.transport.base import Call, PeerError, rank_order
from shardproof.transport.distributed import DistributedTransport
from shardproof.transport.shared_memory import SharedTransport

rank, size = int(sys.argv[1]), int(sys.argv[2])
timeout = float(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", store=dist.FileStore(sys.argv[3], size), rank=rank, world_size=size,
    timeout=timedelta(seconds=60),
)
seen = []
transport = SharedTransport.connect(
    DistributedTransport(dist.group.WORLD, check=False), timeout=timeout, observer=seen.append
)
order = rank_order(size)
"""
_END = """
print(f"error of {error.rank}: {error}; saw {seen[-1]}", flush=True)
"""
# Sums without end, of a size that is given; the test says when that is over.
_SUMS = """
numel = int(sys.argv[5])
x, out = torch.ones(numel), torch.empty(numel)
call = Call("all_reduce", "forward", "layer", (numel,), torch.float32)
print("ready", flush=True)
try:
    while True:
        transport.sum([x], order, out, call=call)
except PeerError as caught:
    error = caught
"""


class Ranks:
    """Processes that run the same code, each as one rank."""

    def __init__(self, folder: Path, code: str, size: int, timeout: float, *more: object) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        store = folder / "store"
        script = _BEGIN + textwrap.dedent(code) + _END
        self.processes = [
            warm.Process(
                [sys.executable, "-c", script, *map(str, (rank, size, store, timeout, *more))],
                env={**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank in range(size)
        ]

    def wait_until_ready(self) -> None:
        """Every rank has mapped the memory and goes to work."""
        for process in self.processes:
            line = process.stdout.readline()
            assert line == "ready\n", process.communicate()[1]
        time.sleep(0.3)

    def last_words(self, rank: int) -> str:
        """What a rank printed before it ended by itself."""
        out, err = self.processes[rank].communicate(timeout=60)
        assert self.processes[rank].returncode == 0, err
        return out

    def end(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Ranks]]:
    started: list[Ranks] = []

    def begin(*arguments: object) -> Ranks:
        started.append(Ranks(tmp_path, *arguments))  # type: ignore[arg-type]
        return started[-1]

    yield begin  # type: ignore[misc]
    for each in started:
        each.end()


@pytest.mark.parametrize(("size", "numel"), [(2, 1024), (3, 1_000_000)])
def test_a_rank_that_is_killed_is_named_by_all_others(size: int, numel: int, start) -> None:
    # With a timeout that no run of the tests reaches: only what the kernel says ends the wait.
    ranks = start(_SUMS, size, 3600.0, numel)
    ranks.wait_until_ready()
    killed = size - 1
    ranks.processes[killed].kill()
    words = [ranks.last_words(rank) for rank in range(size - 1)]

    pid = ranks.processes[killed].pid
    for text in words:
        assert f"error of {killed}: rank {killed} of {size} is gone, its process {pid} has" in text
        assert re.search(rf"wait in forward all_reduce of layer: float32 \({numel},\)", text) or (
            f"waits in forward all_reduce of layer: float32 ({numel},)" in text
        )
        assert f"saw forward all_reduce of layer: float32 ({numel},)" in text


def test_a_rank_that_is_stopped_is_named_after_the_timeout(start) -> None:
    size = 3
    ranks = start(_SUMS, size, 1.5, 1024)
    ranks.wait_until_ready()
    begun = time.monotonic()
    os.kill(ranks.processes[0].pid, signal.SIGSTOP)
    words = [ranks.last_words(rank) for rank in range(1, size)]
    took = time.monotonic() - begun

    for text in words:
        assert f"error of 0: rank 0 of {size} did not come within 1.5 s: rank" in text
        assert "in forward all_reduce of layer: float32 (1024,); saw forward all_reduce" in text
    assert took >= 1.4
    os.kill(ranks.processes[0].pid, signal.SIGCONT)
    assert f"error of 0: rank 0 of {size} did not come" in ranks.last_words(0)


def test_a_rank_that_is_interrupted_tells_the_others(start) -> None:
    ranks = start(
        """
        call = Call("all_reduce", "forward", "layer", (4,), torch.float32)
        print("ready", flush=True)
        try:
            if rank == 2:
                time.sleep(1000)
            transport.sum([torch.ones(4)], order, torch.empty(4), call=call)
        except PeerError as caught:
            error = caught
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            try:  # and from now on it cannot take part
                transport.sum([torch.ones(4)], order, torch.empty(4), call=call)
            except PeerError as caught:
                error = caught
        """,
        3,
        60.0,
    )
    ranks.wait_until_ready()
    ranks.processes[1].send_signal(signal.SIGINT)
    said = "error of 1: rank 1 of 3 raised KeyboardInterrupt; saw forward all_reduce"
    assert said in ranks.last_words(0)
    interrupted = ranks.last_words(1)
    assert interrupted.startswith("interrupted\nerror of 1: rank 1 of 3 raised KeyboardInterrupt")


def test_a_rank_that_fails_tells_the_others(start) -> None:
    ranks = start(
        """
        call = Call("all_reduce", "forward", "layer", (4,), torch.float32)
        print("ready", flush=True)
        if rank == 1:
            time.sleep(0.2)
            transport.fail(ValueError("bad luck"))
        try:
            transport.sum([torch.ones(4)], order, torch.empty(4), call=call)
        except PeerError as caught:
            error = caught
        """,
        2,
        60.0,
    )
    ranks.wait_until_ready()
    for rank in range(2):
        assert "error of 1: rank 1 of 2 raised ValueError: bad luck" in ranks.last_words(rank)


def test_nothing_is_left_when_all_ranks_are_killed(start) -> None:
    def entries() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if "shardproof" in name}

    before = entries()
    ranks = start(_SUMS, 2, 60.0, 1024)
    ranks.wait_until_ready()
    during = entries()
    maps = Path(f"/proc/{ranks.processes[0].pid}/maps").read_text()
    ranks.end()

    assert during == before
    assert "/memfd:shardproof (deleted)" in maps
    assert entries() == before
