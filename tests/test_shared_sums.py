"""Sums, gathers and exchanges on every transport, against answers that every rank knows."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from places import Pool
from shardproof import c_modules
from shardproof.axis import Axis
from shardproof.transport.base import Call, Order, PeerError, Transport, Window, rank_order
from shardproof.transport.distributed import DistributedTransport
from shardproof.transport.portable import SUMMABLE
from shardproof.transport.rendezvous import Rendezvous
from shardproof.transport.shared_memory import SharedTransport
from shardproof.transport.solo import SoloTransport
from shardproof.transport.threads import ThreadsTransport
from sums import random_case, run_gather, run_mixed, run_sums, same_bits

NEEDS_CORE = pytest.mark.skipif(c_modules.shm() is None, reason="the C core was not built")


def group() -> DistributedTransport:
    world = dist.group.WORLD
    assert world is not None
    return DistributedTransport(world, check=False)


def shared() -> SharedTransport:
    return SharedTransport.connect(group(), timeout=60)


def over(name: str, axis: Axis) -> Transport:
    """The transport of that name between the ranks of `axis`."""
    return {"threads": lambda: axis.transport, "shm": shared, "gloo": group}[name]()


def run_threads(
    size: int, work: Callable[[Transport], object], rendezvous: Rendezvous | None = None
) -> list[object]:
    """`work` on bare threads; results or exceptions in rank order."""
    rendezvous = rendezvous or Rendezvous(size, timeout=60)
    found: list[object] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadsTransport(rendezvous, rank))
        except Exception as error:
            rendezvous.fail(rank, error)
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return found


class Impatient(Rendezvous):
    """Rank 0 gives up its first long wait."""

    def _tick(self, rank: int, waited: float, missing: list[int]) -> None:
        if rank == 0 and missing:
            raise InterruptedError("enough")
        super()._tick(rank, waited, missing)


@NEEDS_CORE
def test_what_was_lent_is_not_read_after_its_rank_gave_up_a_wait() -> None:
    """Rank 0 waits for rank 1, which adds without the interpreter lock, and leaves."""
    module = c_modules.shm()
    assert module is not None
    numel = 1 << 22
    order = Order((1, 63), (0, *(n for part in range(1, 64) for n in (part, -1))))
    windows = (Window(1, numel, 1, 0, 0), Window(1, numel, 1, 0, numel))
    call = Call("all_reduce", "forward", "layer", (numel,), torch.float16)

    def work(transport: Transport) -> object:
        x = torch.full((numel,), 2.0, dtype=torch.float16)
        out = torch.empty(0 if transport.rank == 0 else numel, dtype=torch.float16)
        parts = [x] * order.counts[transport.rank]
        if transport.rank == 0:
            time.sleep(0.2)  # so that all of its long wait is for the other's sum
            try:
                transport.sum(parts, order, out, call=call, windows=windows)
            finally:
                x.fill_(float("nan"))
        transport.sum(parts, order, out, call=call, windows=windows)
        return out.unique().tolist()

    module.use_portable(True)  # slowly
    try:
        gave_up, found = run_threads(2, work, Impatient(2, timeout=60))
    finally:
        module.use_portable(False)
    assert isinstance(gave_up, InterruptedError), "the wait was long enough"
    assert found == [128.0]


@NEEDS_CORE
@pytest.mark.parametrize("what", ["sum", "sliced sum"])
def test_a_started_sum_does_not_read_what_was_lent_by_a_rank_that_gave_up(what: str) -> None:
    numel = 1024 if what == "sum" else 1 << 20
    call = Call("all_reduce", "forward", "layer", (numel,), torch.float32)
    given_up = threading.Event()
    outs = [torch.zeros(numel) for _ in range(2)]

    def work(transport: Transport) -> None:
        x = torch.full((numel,), float("nan"))
        pending = transport.start_sum([x], rank_order(2), outs[transport.rank], call=call)
        if transport.rank == 1:
            assert given_up.wait(60)
        try:
            pending.wait()
        finally:
            given_up.set()

    gave_up, other = run_threads(2, work, Impatient(2, timeout=60))
    assert isinstance(gave_up, InterruptedError)
    assert isinstance(other, PeerError)
    assert "rank 0 of 2 raised InterruptedError: enough" in str(other)
    assert not outs[1].any()


WAYS = [
    pytest.param("threads", "threads", degree, id=f"threads-{degree}") for degree in (2, 3, 8)
] + [
    pytest.param("shm", "processes", degree, id=f"shm-{degree}", marks=NEEDS_CORE)
    for degree in (2, 3, 4)
]
WITH_GLOO = [*WAYS, pytest.param("gloo", "processes", 3, id="gloo-3")]


@pytest.mark.parametrize(("name", "engine", "degree"), WITH_GLOO)
def test_sums_have_the_bits_of_their_order(name: str, engine: str, degree: int, pool: Pool) -> None:
    seeds = range(20)

    def work(axis: Axis) -> int:
        return run_sums(over(name, axis), seeds)

    assert pool(degree, engine).run(work) == [len(seeds)] * degree


@pytest.mark.parametrize(("name", "engine", "degree"), WITH_GLOO)
def test_gathers_place_every_row(name: str, engine: str, degree: int, pool: Pool) -> None:
    def work(axis: Axis) -> int:
        transport = over(name, axis)
        for seed in range(12):
            run_gather(transport, seed)
        return 12

    assert pool(degree, engine).run(work) == [12] * degree


@pytest.mark.parametrize(("name", "engine", "degree"), WAYS)
def test_collectives_of_all_kinds_follow_each_other(
    name: str, engine: str, degree: int, pool: Pool
) -> None:
    seeds = range(1000, 1024)

    def work(axis: Axis) -> int:
        return run_mixed(over(name, axis), seeds)

    assert pool(degree, engine).run(work) == [len(seeds)] * degree


def test_threads_do_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_modules, "shm", lambda: None)

    def work(transport: Transport) -> int:
        return run_sums(transport, range(25)) + run_mixed(transport, range(1000, 1040))

    assert run_threads(3, work) == [65] * 3


def test_alone_sums_have_the_bits_of_their_order() -> None:
    transport = SoloTransport()
    assert run_sums(transport, range(40)) == 40
    for seed in range(10):
        run_gather(transport, seed)


@pytest.mark.parametrize("dtype", SUMMABLE, ids=str)
def test_every_dtype_is_added_by_threads(dtype: torch.dtype) -> None:
    def work(transport: Transport) -> str:
        for seed in range(4):
            case = random_case(seed, transport.rank, 3, [dtype])
            transport.sum(case.parts, case.order, case.out, call=case.call, windows=case.windows)
            case.check()
        return str(dtype)

    assert run_threads(3, work) == [str(dtype)] * 3


def test_the_order_shows_in_the_bits() -> None:
    """What the tests above compare can differ: the same parts in another order."""
    parts = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    call = Call("all_reduce", "forward", "test", (1000,), torch.float32)

    def total(program: tuple[int, ...]) -> Callable[[Transport], torch.Tensor]:
        def work(transport: Transport) -> torch.Tensor:
            out = torch.empty(1000)
            order = Order((1, 1, 1), program)
            transport.sum([parts[transport.rank].clone()], order, out, call=call)
            return out

        return work

    left = run_threads(3, total((0, 1, -1, 2, -1)))
    right = run_threads(3, total((0, 1, 2, -1, -1)))
    assert isinstance(left[0], torch.Tensor)
    assert isinstance(right[0], torch.Tensor)
    assert same_bits(left[0], (parts[0] + parts[1]) + parts[2])
    assert same_bits(right[0], parts[0] + (parts[1] + parts[2]))
    assert not same_bits(left[0], right[0])
