"""`Transport`: the protocol between collectives and the transports.

A transport sends one-dimensional contiguous tensors and small Python values between the ranks of
one axis, and adds tensors in a given order. It knows nothing of leaves, trees, autograd or layers.
"""

import functools
import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from shardproof.errors import MismatchError, RankError, ShapeError
from shardproof.transport.ledger import Ledger
from shardproof.transport.notes import NOTHING, CallNotes, Notes
from shardproof.wording import dtype_name


@dataclass(frozen=True)
class Call:
    """The description of one collective, which must be equal on all ranks.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter", "gather", "exchange".
        direction: one of `ledger.DIRECTIONS`.
        who: name of the layer or function, for messages.
        shape: the global shape of the result.
        dtype: dtype of the tensors that are sent.
        detail: anything else that must be equal (a cut, a plan's digest).
    """

    kind: str
    direction: str
    who: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    detail: str = ""

    @functools.cached_property
    def digest(self) -> int:
        """A 64-bit hash, computed once per object; equal calls have equal hashes."""
        return digest_of(str(self))

    def __str__(self) -> str:
        dtype = dtype_name(self.dtype) if self.dtype is not None else "object"
        detail = f" [{self.detail}]" if self.detail else ""
        who = f" of {self.who}" if self.who else ""
        return f"{self.direction} {self.kind}{who}: {dtype} {tuple(self.shape)}{detail}"


@dataclass(frozen=True)
class Order:
    """The order in which the ranks' parts are added. Create it once: plans are cached by it.

    Attributes:
        counts: number of parts of each rank. Parts are numbered in rank order.
        program: postfix program: n >= 0 pushes part n, and -1 adds the two topmost values, with the
            lower one as the left operand.
        is_free: whether a transport may use a faster order of its own (native numerics).
    """

    counts: tuple[int, ...]
    program: tuple[int, ...]
    is_free: bool = False

    @functools.cached_property
    def digest(self) -> int:
        """A 64-bit hash, computed once per object."""
        return digest_of(repr((self.counts, self.program)))

    def check(self, size: int) -> None:
        """Raise unless the program adds every part of `size` ranks once."""
        depth = 0
        for step in self.program:
            depth += 1 if step >= 0 else -1
            if depth < 1:
                break
        pushed = sorted(step for step in self.program if step >= 0)
        if depth != 1 or pushed != list(range(sum(self.counts))) or len(self.counts) != size:
            raise ShapeError(
                f"{self} does not add {sum(self.counts)} parts of {size} ranks, each once. Name "
                "every part once, and after two sums put -1."
            )


@functools.lru_cache
def rank_order(size: int) -> Order:
    """One part per rank, added from rank 0 upwards; the transport may use its own order.

    >>> rank_order(3).program
    (0, 1, -1, 2, -1)
    """
    program = [0]
    for rank in range(1, size):
        program += [rank, -1]
    return Order((1,) * size, tuple(program), is_free=True)


@dataclass(frozen=True)
class Window:
    """`[:, start:stop, :]` of a tensor seen as (outer, size, inner)."""

    outer: int
    size: int
    inner: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements of the window."""
        return self.outer * (self.stop - self.start) * self.inner


class Pending(ABC):
    """A sum that was started."""

    @abstractmethod
    def wait(self) -> None:
        """Finish the sum: `out` is filled, and this rank's parts may be written again."""


class Finished(Pending):
    """A sum that was finished when it was started."""

    def wait(self) -> None:
        """Nothing is left to do."""


class PeerError(RankError):
    """The error of a rank after another rank has failed; launchers look for the cause."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_peer_error, (str(self), self.rank))


def _peer_error(message: str, rank: int | None) -> PeerError:
    return PeerError(message, rank=rank)


def mismatch(descriptions: Sequence[str]) -> MismatchError:
    """The error that every rank raises if the ranks' calls of one collective differ.

    Args:
        descriptions: description of each rank's call, in rank order; not all equal. The first line
            is the call; the other lines are shown only if the calls are equal.
    """
    heads = [description.partition("\n")[0] for description in descriptions]
    is_enough = len(set(heads)) > 1
    descriptions = heads if is_enough else [each.replace("\n", ", ") for each in descriptions]
    ranks: dict[str, list[int]] = {}
    for rank, description in enumerate(descriptions):
        ranks.setdefault(description, []).append(rank)
    sides = [f"{name_ranks(who)}: {description}" for description, who in ranks.items()]
    return MismatchError(
        f"the ranks disagree about one collective. {'; '.join(sides)}. All ranks must make the "
        "same calls in the same order, with the same shapes and dtypes."
    )


def digest_of(text: str) -> int:
    """A 64-bit hash of `text`, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks for a message.

    >>> name_ranks([0, 2, 3])
    'ranks 0, 2 and 3'
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def name_waits(calls: Mapping[int, object]) -> str:
    """The ranks that wait in each call, for a message.

    >>> name_waits({0: "all_reduce", 2: "all_reduce"})
    'ranks 0 and 2 wait in all_reduce'
    """
    ranks: dict[str, list[int]] = {}
    for rank, call in sorted(calls.items()):
        ranks.setdefault(str(call), []).append(rank)
    return "; ".join(
        f"{name_ranks(who)} {'waits' if len(who) == 1 else 'wait'} in {call}"
        for call, who in ranks.items()
    )


# The error of a rank that begins a collective inside another one. The C core has it too.
BUSY = (
    "two threads use one rank's transport at the same time, or a signal handler uses it while the "
    "rank does. Make all collectives of an axis in one thread of each rank, one after the other"
)
# Every transport of this process, so that a fork of it can be kept from using them (`disabled.py`).
living: "weakref.WeakSet[Transport]" = weakref.WeakSet()


def compare_pieces(
    lengths_by_rank: Sequence[tuple[list[list[int]], list[list[int]]]], call: Call
) -> None:
    """Raise on all ranks unless every rank gets pieces of the expected lengths."""
    for sender, (sent, _) in enumerate(lengths_by_rank):
        for receiver, (_, expected) in enumerate(lengths_by_rank):
            if sent[receiver] != expected[sender]:
                raise MismatchError(
                    f"{call}: rank {sender} hands pieces of {sent[receiver]} to rank {receiver}, "
                    f"which expects {expected[sender]}. Both must derive them from the same cut."
                )


class Transport(ABC):
    """Sends bytes between the ranks of one axis; one object per rank.

    Attributes:
        name: "solo", "threads", "shm", "hosts", "gloo", "nccl".
        rank, size: this rank, and the number of ranks.
        ledger: counts of the collectives so far.
        is_asynchronous: whether a started sum proceeds while its rank computes.
        notes: notes of tensors that must be the same on all ranks; None if none are compared.
        timeout: seconds that a rank waits in one collective; None: the default of what it uses.
    """

    is_asynchronous = False
    notes: Notes | None = None
    timeout: float | None = None
    name: str
    rank: int
    size: int
    ledger: Ledger

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Create a transport and register it in `living`."""
        transport = super().__new__(cls)
        living.add(transport)
        return transport

    @property
    def current_call(self) -> Call | None:
        """The collective in which this rank is now, as far as the transport knows."""
        return None

    def take_notes(self) -> CallNotes:
        """Take the notes that go with the next exchange."""
        return NOTHING if self.notes is None else self.notes.take()

    def forget_notes(self) -> None:
        """Drop all notes, after ranks have disagreed."""
        if self.notes is not None:
            self.notes.forget()

    @abstractmethod
    def exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        *,
        rounds: int,
        like: Tensor,
        call: Call,
    ) -> list[list[Tensor]]:
        """All-to-all of any number of pieces.

        Args:
            outgoing: for each rank, the 1-D contiguous pieces it is to get (own rank: ignored).
            incoming: for each rank, the lengths of the pieces it sends here (own rank: ignored).
            rounds: the largest number of pieces from any rank to any other, the same on all ranks;
                a transport that sends one piece per pair at a time needs so many rounds.
            like: any tensor with the dtype and device of the pieces.
            call: description of the collective.

        Returns:
            For each rank, its pieces in order; an empty list for the own rank. They may lie in the
            sender's memory, so they must not be written, by the receiver or by the sender.
        """

    @abstractmethod
    def all_gather(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call, outer: int = 1
    ) -> None:
        """Fill `out` with the ranks' `x`, side by side in rank order in each of `outer` rows.

        Args:
            x: (outer * sizes[rank],), contiguous; may be written again when this returns.
            out: (outer * sum(sizes),), contiguous, written.
            sizes: every rank's length of one row; they may differ and may be 0.
            call: description of the collective.
            outer: number of rows.
        """

    @abstractmethod
    def start_sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> Pending:
        """Start the sum of the ranks' parts in the given order.

        At most two sums may be started and not finished. They are finished in the order in which
        they were started, and nothing else may be called in between.

        Args:
            parts: this rank's parts, as many as `order` says, flat and contiguous, with one dtype
                and length on all ranks; not written before `wait()` has returned. A rank without
                parts assumes float32 if `out` has 16 bits, else the dtype of `out`.
            order: order of the additions. Parts of 16 bits are added in float32.
            out: flat and contiguous, written; it may be the same memory as this rank's only part.
                Where its dtype is narrower than the parts', the sum is rounded once, at the end.
            call: description of the collective.
            windows: for each rank, its window of the sum, contiguous in `out`; all have the same
                (outer, size, inner). None if every rank gets the whole sum.
        """

    def gather_slices(self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call) -> None:
        """`all_gather` at the end of a call that was compared at its beginning."""
        self.all_gather(x, out, sizes, call=call)

    def sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> None:
        """`start_sum` and `wait` in one."""
        self.start_sum(parts, order, out, call=call, windows=windows).wait()

    def all_reduce(self, x: Tensor, out: Tensor | None = None, *, call: Call) -> Tensor:
        """Sum the ranks' `x` (1-D, contiguous) in the transport's own order.

        Returns:
            `out`, or a new tensor where that is None.
        """
        y = torch.empty_like(x, requires_grad=False) if out is None else out
        self.sum([x], rank_order(self.size), y, call=call)
        return y

    @abstractmethod
    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Every rank's small picklable value, in rank order, on every rank."""
