"""Every primitive of every transport, against answers that are written out or computed alone."""

import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from played_hosts import over_hosts
from shardproof import c_modules
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.errors import MismatchError, RankError, ShapeError, UsageError
from shardproof.transport.base import (
    Call,
    Order,
    PeerError,
    Window,
    mismatch,
    name_ranks,
    rank_order,
)
from shardproof.transport.distributed import DistributedTransport
from shardproof.transport.rendezvous import Rendezvous
from shardproof.transport.solo import SoloTransport
from shardproof.transport.threads import ThreadsTransport

Pool = Callable[[int, str], Ranks]

PLACES = [
    pytest.param(degree, engine, id=f"{engine}-{degree}")
    for engine, degrees in (("threads", (1, 2, 3, 8)), ("processes", (2, 3)), ("gloo", (2, 3)))
    for degree in degrees
] + [pytest.param(6, "3 hosts", id="hosts-6"), pytest.param(4, "2 hosts", id="hosts-4")]
EVERYWHERE = pytest.mark.parametrize(("degree", "engine"), PLACES)
TOGETHER = pytest.mark.parametrize(
    ("degree", "engine"), [place for place in PLACES if place.values[0] != 1]
)


def run_on(pool: Pool, degree: int, engine: str, work: Callable[[Axis], Any]) -> list[Any]:
    """Every rank's result; "gloo": processes, over their process group; "3 hosts": over these."""
    if engine.endswith("hosts"):
        hosts = int(engine.split()[0])
        return pool(degree, "processes").run(lambda axis: work(over_hosts(axis, hosts)))
    if engine != "gloo":
        return pool(degree, engine).run(work)
    return pool(degree, "processes").run(lambda axis: work(Axis("tp", gloo(check=True))))


def gloo(*, check: bool, timeout: float | None = None) -> DistributedTransport:
    group = dist.group.WORLD
    assert group is not None
    return DistributedTransport(group, check=check, timeout=timeout)


def call(kind: str, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Call:
    return Call(kind, "forward", "test", tuple(shape), dtype)


def piece_lengths(sender: int, receiver: int) -> list[int]:
    """0 to 2 pieces, some of them empty, another number for every pair."""
    return [(2 * sender + receiver + index) % 4 for index in range((sender + 2 * receiver) % 3)]


def piece(sender: int, receiver: int, index: int, dtype: torch.dtype) -> Tensor:
    length = piece_lengths(sender, receiver)[index]
    value = 1 + 16 * sender + 4 * receiver + index
    return torch.full((length,), value, dtype=torch.int64).add_(torch.arange(length)).to(dtype)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bfloat16, torch.bool])
def test_exchange_moves_every_piece_to_its_rank(
    degree: int, engine: str, dtype: torch.dtype, pool: Pool
) -> None:
    ranks = range(degree)

    def work(axis: Axis) -> list[list[Tensor]]:
        outgoing = [
            [piece(axis.rank, peer, i, dtype) for i in range(len(piece_lengths(axis.rank, peer)))]
            for peer in ranks
        ]
        outgoing[axis.rank] = [torch.ones(7, dtype=dtype)]  # ignored
        incoming = [piece_lengths(peer, axis.rank) for peer in ranks]
        return axis.transport.exchange(
            outgoing,
            incoming,
            rounds=2,
            like=torch.empty(0, dtype=dtype),
            call=call("exchange", dtype=dtype),
        )

    received = run_on(pool, degree, engine, work)

    moved = 0
    for receiver in ranks:
        assert received[receiver][receiver] == []
        for sender in set(ranks) - {receiver}:
            pieces = received[receiver][sender]
            assert [len(x) for x in pieces] == piece_lengths(sender, receiver)
            for index, x in enumerate(pieces):
                assert x.dtype == dtype
                assert torch.equal(x, piece(sender, receiver, index, dtype))
                moved += len(x)
    assert moved > 0 or degree == 1


@EVERYWHERE
@pytest.mark.parametrize("sizes", ["equal", "uneven", "some empty", "all empty"])
def test_all_gather_joins_in_rank_order(degree: int, engine: str, sizes: str, pool: Pool) -> None:
    lengths = {
        "equal": [5] * degree,
        "uneven": [7 - rank % 3 for rank in range(degree)],
        "some empty": [3 * (rank % 2) for rank in range(degree)],
        "all empty": [0] * degree,
    }[sizes]
    full = torch.arange(1.0, sum(lengths) + 1)

    def work(axis: Axis) -> Tensor:
        x = full.split(lengths)[axis.rank].clone()
        out = torch.full((sum(lengths),), -1.0)
        axis.transport.all_gather(x, out, lengths, call=call("all_gather", out.shape))
        return out

    for out in run_on(pool, degree, engine, work):
        assert torch.equal(out, full)


@EVERYWHERE
@pytest.mark.parametrize("length", [0, 1, 5, 20_011])  # the last is added up slice by slice
def test_all_reduce_sums_and_leaves_its_input_alone(
    degree: int, engine: str, length: int, pool: Pool
) -> None:
    def work(axis: Axis) -> tuple[Tensor, bool]:
        x = torch.arange(float(length)).add_(axis.rank)
        before = x.clone()
        y = axis.transport.all_reduce(x, call=call("all_reduce", x.shape))
        axis.transport.gather_objects(None, call=call("agree"))  # everybody has read
        y.add_(1)
        return y, torch.equal(x, before)

    want = degree * torch.arange(float(length)) + degree * (degree - 1) / 2 + 1
    for y, is_unchanged in run_on(pool, degree, engine, work):
        assert torch.equal(y, want)
        assert is_unchanged


@pytest.mark.parametrize("length", [100, 20_011])
def test_threads_add_in_rank_order(length: int, pool: Pool) -> None:
    partials = torch.randn(3, length, generator=torch.Generator().manual_seed(0))

    def work(axis: Axis) -> Tensor:
        x = partials[axis.rank].clone()
        return axis.transport.all_reduce(x, call=call("all_reduce", x.shape))

    in_order = (partials[0] + partials[1]) + partials[2]
    for y in pool(3, "threads").run(work):
        assert torch.equal(y, in_order)
    other_order = partials[0] + (partials[1] + partials[2])
    assert not torch.equal(in_order, other_order), "the order shows in the bits"


@EVERYWHERE
def test_objects_arrive_in_rank_order(degree: int, engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> list[object]:
        value = {"rank": axis.rank, "text": "x" * axis.rank}
        return axis.transport.gather_objects(value, call=call("agree"))

    want = [{"rank": rank, "text": "x" * rank} for rank in range(degree)]
    assert run_on(pool, degree, engine, work) == [want] * degree


@EVERYWHERE
def test_tensors_that_require_grad_are_moved_as_plain_ones(
    degree: int, engine: str, pool: Pool
) -> None:
    def work(axis: Axis) -> bool:
        x = torch.ones(3, requires_grad=True)
        out = torch.empty(3 * axis.size)
        axis.transport.all_gather(x, out, [3] * axis.size, call=call("all_gather", out.shape))
        total = axis.transport.all_reduce(x, call=call("all_reduce", x.shape))
        return out.requires_grad or total.requires_grad

    assert run_on(pool, degree, engine, work) == [False] * degree


class _LargestStorage(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // 4)
        return out


def test_no_buffer_of_an_exchange_holds_more_than_size_minus_one_pieces(pool: Pool) -> None:
    def work(axis: Axis) -> int:
        pieces = [[torch.ones(10) for _ in range(4)] for _ in range(axis.size)]
        with _LargestStorage() as largest:
            axis.transport.exchange(
                pieces,
                [[10] * 4] * axis.size,
                rounds=4,
                like=pieces[0][0],
                call=call("exchange"),
            )
        return largest.numel

    assert run_on(pool, 3, "gloo", work) == [20] * 3
    assert max(pool(3, "processes").run(work)) <= 20


def test_no_buffer_of_an_uneven_gather_exceeds_the_message(pool: Pool) -> None:
    sizes = [203, 203, 202]

    def work(axis: Axis) -> int:
        x, out = torch.ones(sizes[axis.rank]), torch.empty(sum(sizes))
        with _LargestStorage() as largest:
            axis.transport.all_gather(x, out, sizes, call=call("all_gather", out.shape))
        return largest.numel

    assert max(run_on(pool, 3, "gloo", work)) <= sum(sizes)
    assert max(pool(3, "processes").run(work)) <= sum(sizes)


# Ranks that disagree ---------------------------------------------------------------------------

DISAGREEMENTS = {
    "shape": (call("all_reduce", (4, 8)), call("all_reduce", (4, 9)), "float32 (4, 9)"),
    "dtype": (
        call("all_reduce", (4, 8)),
        call("all_reduce", (4, 8), torch.float64),
        "float64 (4, 8)",
    ),
    "kind": (call("all_reduce", (4, 8)), call("all_gather", (4, 8)), "forward all_gather of test"),
    "detail": (
        call("all_reduce", (4, 8)),
        Call("all_reduce", "forward", "test", (4, 8), torch.float32, "64 units"),
        "[64 units]",
    ),
}


@TOGETHER
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree_all_raise_the_same(
    degree: int, engine: str, what: str, pool: Pool
) -> None:
    usual, odd, _ = DISAGREEMENTS[what]

    def work(axis: Axis) -> str:
        mine = odd if axis.rank == 1 else usual
        x = torch.ones(*mine.shape, dtype=mine.dtype).view(-1)
        sizes = [len(x)] * axis.size
        out = x.new_empty(sum(sizes))

        def collective() -> object:
            if mine.kind == "all_reduce":
                return axis.transport.all_reduce(x, call=mine)
            return axis.transport.all_gather(x, out, sizes, call=mine)

        with pytest.raises(MismatchError) as caught:
            collective()
        return str(caught.value)

    messages = run_on(pool, degree, engine, work)

    assert len(set(messages)) == 1
    others = name_ranks([rank for rank in range(degree) if rank != 1])
    assert f"{others}: forward all_reduce of test: float32 (4, 8); rank 1: " in messages[0]
    assert DISAGREEMENTS[what][2] in messages[0].split("rank 1: ")[1]


def test_the_message_of_a_mismatch_names_both_sides() -> None:
    a = Call("all_reduce", "forward", "mlp.down", (4, 8), torch.float32)
    b = Call("all_reduce", "forward", "mlp.down", (4, 8), torch.float64)
    assert (
        "rank 0: forward all_reduce of mlp.down: float32 (4, 8); "
        "rank 1: forward all_reduce of mlp.down: float64 (4, 8)."
    ) in str(mismatch([str(a), str(b)]))


def test_gloo_compares_without_being_asked(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        mine = Call("all_reduce", "forward", f"rank {axis.rank}", (2,), torch.float32)
        with pytest.raises(MismatchError) as caught:
            gloo(check=False).all_reduce(torch.ones(2), call=mine)
        return str(caught.value)

    for message in pool(2, "processes").run(work):
        assert "rank 0: forward all_reduce of rank 0: float32 (2,); rank 1: " in message


def test_an_error_of_the_backend_names_rank_and_call_and_keeps_its_cause(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, str] | None:
        group = dist.new_group(timeout=timedelta(seconds=60))
        transport = DistributedTransport(group, check=False, timeout=0.5)
        if axis.rank == 1:
            return None
        with pytest.raises(RankError) as caught:
            transport.all_reduce(torch.ones(2), call=call("all_reduce", (2,)))
        return str(caught.value), type(caught.value.__cause__).__name__

    found, _ = pool(2, "processes").run(work)
    assert found is not None
    message, cause = found
    assert message.startswith("gloo failed on rank 0 of 2 in forward all_reduce of test")
    assert "timed out" in message
    assert cause == "RuntimeError"


def test_threads_compare_the_pieces_with_what_is_expected(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        with pytest.raises(MismatchError) as caught:
            axis.transport.exchange(
                [[torch.ones(3)]] * 2,
                [[4]] * 2,
                rounds=1,
                like=torch.ones(0),
                call=call("exchange"),
            )
        return str(caught.value)

    first, second = pool(2, "threads").run(work)
    assert "rank 1 hands pieces of [3] to rank 0, which expects [4]" in first
    assert "rank 0 hands pieces of [3] to rank 1, which expects [4]" in second


@pytest.mark.parametrize(
    ("degree", "engine"), [(1, "threads"), (2, "threads"), (2, "processes"), (2, "gloo")]
)
def test_a_part_that_does_not_fit_is_refused_before_anything_is_sent(
    degree: int, engine: str, pool: Pool
) -> None:
    def work(axis: Axis) -> str:
        # A part of one element could otherwise be spread over the place of many.
        sizes = [3] * axis.size
        with pytest.raises(ShapeError) as caught:
            axis.transport.all_gather(
                torch.ones(1), torch.empty(sum(sizes)), sizes, call=call("all_gather")
            )
        return str(caught.value)

    for message in run_on(pool, degree, engine, work):
        assert message.startswith("forward all_gather of test")
        assert f"sizes {[3] * degree}" in message or f"sizes are {[3] * degree}" in message


def test_more_parts_than_the_core_adds_at_once_are_refused(pool: Pool) -> None:
    if c_modules.shm() is None:
        pytest.skip("the C core was not built")
    order = Order((65, 0), (0, *(step for part in range(1, 65) for step in (part, -1))))

    def work(axis: Axis) -> str:
        parts = [torch.ones(2)] * order.counts[axis.rank]
        with pytest.raises(UsageError) as caught:
            axis.transport.sum(parts, order, torch.empty(2), call=call("all_reduce"))
        return str(caught.value)

    for message in run_on(pool, 2, "threads", work):
        assert "a rank has 65 parts, and no more than 64 go into one sum. Add some" in message


def test_a_result_that_is_not_as_long_as_its_window_is_refused() -> None:
    window = Window(outer=1, size=4, inner=2, start=1, stop=3)
    said = r"test: .*rank 0 of 1 has room for 8 elements, and its window .* has 4\."
    with pytest.raises(ShapeError, match=said):
        SoloTransport().sum(
            [torch.ones(8)], rank_order(1), torch.empty(8), call=call("all_reduce"),
            windows=(window,),
        )  # fmt: skip


def test_a_sum_over_a_process_group_is_waited_for_once(pool: Pool) -> None:
    def work(axis: Axis) -> list[float]:
        out = torch.empty(4)
        pending = axis.transport.start_sum(
            [torch.ones(4)], Order((1, 1), (0, 1, -1)), out, call=call("all_reduce")
        )
        pending.wait()
        with pytest.raises(UsageError, match="waited for that was not started, or twice"):
            pending.wait()
        return out.tolist()

    assert run_on(pool, 2, "gloo", work) == [[2.0] * 4] * 2


# The rendezvous --------------------------------------------------------------------------------


@pytest.fixture(params=["core", "Python"], autouse=False)
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait in the C core, or in Python where it is missing."""
    if request.param == "Python":
        monkeypatch.setattr(c_modules, "shm", lambda: None)
    elif c_modules.shm() is None:
        pytest.skip("the C core was not built")


BOTH_WAYS = pytest.mark.usefixtures("waiting")


def meet_as(size: int, work: Callable[[int], object]) -> list[object]:
    """Run `work(rank)` on bare threads; results or exceptions in rank order."""
    found: list[object] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return found


@BOTH_WAYS
def test_a_fast_rank_never_overwrites_what_a_slow_one_still_reads() -> None:
    meetings = 300
    rendezvous = Rendezvous(3, timeout=30)

    def work(rank: int) -> int:
        dice = random.Random(rank)
        for index in range(meetings):
            offers = rendezvous.meet(rank, call("exchange"), [index, rank])
            if dice.random() < 0.1:
                time.sleep(0.001)  # the others go on
            assert offers == [[index, peer] for peer in range(3)]
        return meetings

    assert meet_as(3, work) == [meetings] * 3


@BOTH_WAYS
def test_what_was_lent_is_freed_when_all_have_read_it() -> None:
    rendezvous = Rendezvous(2, timeout=30)

    def work(rank: int) -> weakref.ref[Tensor]:
        transport = ThreadsTransport(rendezvous, rank)
        x = torch.ones(4)
        transport.all_gather(x, torch.empty(8), [4, 4], call=call("all_gather", (8,)))
        return weakref.ref(x)

    assert [reference() for reference in meet_as(2, work)] == [None, None]


@BOTH_WAYS
def test_a_timeout_names_the_missing_and_where_the_others_wait() -> None:
    rendezvous = Rendezvous(4, timeout=0.2)
    meeting = call("all_reduce", (3,))

    def work(rank: int) -> object:
        return None if rank in (1, 2) else rendezvous.meet(rank, meeting, None)

    found = meet_as(4, work)
    for rank in (0, 3):
        error = found[rank]
        assert isinstance(error, PeerError)
        assert error.rank == 1
        assert str(error) == (
            "ranks 1 and 2 of 4 did not come within 0.2 s: ranks 0 and 3 wait in "
            "forward all_reduce of test: float32 (3,)"
        )


@BOTH_WAYS
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_rank_that_left_is_named(order: str) -> None:
    rendezvous = Rendezvous(2, timeout=30)

    def work(rank: int) -> object:
        if (rank == 0) == (order == "after"):
            time.sleep(0.1)
        if rank == 1:
            return rendezvous.leave(1)
        return rendezvous.meet(0, call("all_reduce", (3,)), None)

    error, _ = meet_as(2, work)
    assert isinstance(error, PeerError)
    assert error.rank == 1
    assert str(error).startswith("rank 1 of 2 returned and will not come: rank 0 waits in forward")


@BOTH_WAYS
def test_a_rank_that_raised_is_named_to_those_who_wait_and_those_who_come_later() -> None:
    rendezvous = Rendezvous(3, timeout=30)

    def work(rank: int) -> object:
        if rank == 1:
            time.sleep(0.1)
            return rendezvous.fail(1, ValueError("bad luck"))
        if rank == 2:
            time.sleep(0.2)
        return rendezvous.meet(rank, call("all_reduce", (3,)), None)

    early, _, late = meet_as(3, work)
    for error in (early, late):
        assert isinstance(error, PeerError)
        assert (str(error), error.rank) == ("rank 1 of 3 raised ValueError: bad luck", 1)


@BOTH_WAYS
def test_all_ranks_may_leave_when_nobody_waits() -> None:
    rendezvous = Rendezvous(2, timeout=30)

    def work(rank: int) -> object:
        rendezvous.meet(rank, call("all_reduce"), None)
        rendezvous.leave(rank)
        return rank

    assert meet_as(2, work) == [0, 1]
