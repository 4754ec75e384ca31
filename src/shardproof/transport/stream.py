"""`Stream`: all exchanges of one process group, which compare the ranks' calls.

A backend such as gloo does not check its messages: ranks that call two layers in another order add
wrong numbers, and a message of another length aborts the process. Comparing first would cost a
small exchange. Here each message begins with 16 bytes instead: the digests of the call and of the
notes before it. For that the lengths must fit, also if the ranks' calls differ. So each rank
remembers which exchange followed which, which is the same on all ranks while they agree:

- the exchange is the one that followed last time: its message begins with the digests, and they are
  compared when it has come;
- another one: the rank sends a hollow message of the lengths that the others may expect, with the
  digests of what it wants. If all ranks want that, they exchange it then;
- nothing has followed yet: the same, and the hollow message is the digests alone.

So a sequence of calls that repeats costs 16 bytes a message, and every difference is found in the
exchange in which it comes up, before a rank has read another's numbers. All axes of a group are one
sequence, because they share the backend's.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shardproof.errors import MismatchError
from shardproof.transport.notes import CallNotes

_HEAD = 16  # bytes before each message: two digests; a multiple of all element sizes
_PAST = 3  # number of previous calls by which the next one is predicted
_MOST = 4096  # number of such histories that are kept

Finish = Callable[[], None]
# (what arrives, what is sent, bytes from each rank, bytes to each rank): begun; the rest waits.
Post = Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], Finish]


class NextExchange(NamedTuple):
    """The exchange that this rank wants to make next.

    Attributes:
        digest: hash of the call and of the axis.
        call_notes: the notes before it.
        post: function that starts an all-to-all of bytes on the group.
        reduce: function that starts the backend's own sum over the group, in place.
        disagree: function that returns the error; all ranks call it after a mismatch.
    """

    digest: int
    call_notes: CallNotes
    post: Post
    reduce: Callable[[Tensor], Finish]
    disagree: Callable[[CallNotes], MismatchError]


class Round(NamedTuple):
    """One message for each rank, by its length in bytes.

    Attributes:
        sent, received: bytes to and from each rank; 0 for this rank.
        reduced, dtype: number and dtype of the elements that the backend sums in addition. The
            backend divides them by their number, which bytes alone would not tell.
        is_for_heads: whether it only carries the digests, and is skipped if they were compared.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    reduced: int = 0
    dtype: torch.dtype = torch.uint8
    is_for_heads: bool = False


class _Step(NamedTuple):
    """The parts of an exchange that are the same each time it is repeated."""

    digest: int
    rounds: tuple[Round, ...]


class Exchange:
    """A started exchange, with one all-to-all for each round.

    Args:
        wish: the exchange that this rank wants.
        rank: the rank of this process.
        rounds: the rounds, by their bytes.
        pieces: for each round, bytes for each rank, and the tensor to sum; None for zeros only.
        has_heads: whether the messages of the first round begin with the digests.
    """

    def __init__(
        self,
        wish: NextExchange,
        rank: int,
        rounds: Sequence[Round],
        pieces: Sequence[Sequence[Tensor]] | None,
        *,
        has_heads: bool,
    ) -> None:
        self._wish = wish
        self._rank = rank
        self._rounds = rounds
        self._heads = _HEAD if has_heads else 0
        self._inboxes: list[Tensor] = []
        self._finishes: list[Finish] = []
        self._is_in_order: bool | None = None if has_heads else True
        self._summand: Tensor | None = None
        for index, each in enumerate(rounds):
            self._send(each, None if pieces is None else pieces[index], index == 0)

    def _send(self, each: Round, pieces: Sequence[Tensor] | None, is_first: bool) -> None:
        extra = self._heads if is_first else 0
        if each.reduced:
            x = (
                torch.zeros(each.reduced, dtype=each.dtype, device="cpu")
                if pieces is None
                else pieces[-1]
            )
            self._summand = x
            self._finishes.append(self._wish.reduce(x))
        sent = [0 if p == self._rank else n + extra for p, n in enumerate(each.sent)]
        received = [0 if p == self._rank else n + extra for p, n in enumerate(each.received)]
        inbox = torch.empty(sum(received), dtype=torch.uint8, device="cpu")
        outbox = self._outbox(each, pieces, extra)
        self._inboxes.append(inbox)
        if extra or not each.is_for_heads:
            self._finishes.append(self._wish.post(inbox, outbox, received, sent))

    def _outbox(self, each: Round, pieces: Sequence[Tensor] | None, extra: int) -> Tensor:
        if pieces is None:
            pieces = [torch.zeros(length, dtype=torch.uint8, device="cpu") for length in each.sent]
        head = self._head()[:extra]
        views = [
            x
            for peer, piece in enumerate(pieces[: len(each.sent)])
            if peer != self._rank
            for x in (head, piece)
            if x.numel()
        ]
        return views[0] if len(views) == 1 else torch.cat(views) if views else head[:0]

    def _head(self) -> Tensor:
        digests = [self._wish.digest - (1 << 63), self._wish.call_notes.value - (1 << 63)]
        return torch.tensor(digests, device="cpu").view(torch.uint8)

    def is_in_order(self) -> bool:
        """Wait, and return whether all ranks want the same exchange."""
        if self._is_in_order is None:
            for finish in self._finishes:
                finish()
            self._finishes = []
            mine = self._head().tolist()
            starts = self._starts(self._rounds[0].received, self._heads)
            heads = [self._inboxes[0][at : at + _HEAD].tolist() for at in starts]
            self._is_in_order = all(each == mine for each in heads)
        return self._is_in_order

    def _starts(self, received: Sequence[int], extra: int) -> list[int]:
        others = [n + extra for peer, n in enumerate(received) if peer != self._rank]
        return [0, *itertools.accumulate(others)][: len(others)]

    def received(self) -> list[list[Tensor]]:
        """Wait, and return for each round the bytes from each other rank."""
        for finish in self._finishes:
            finish()
        self._finishes = []
        pieces = []
        for index, (inbox, each) in enumerate(zip(self._inboxes, self._rounds, strict=True)):
            extra = self._heads if index == 0 else 0
            starts = iter(self._starts(each.received, extra))
            pieces.append(
                [
                    inbox[:0]
                    if peer == self._rank
                    else inbox[(at := next(starts) + extra) : at + length]
                    for peer, length in enumerate(each.received)
                ]
            )
        return pieces


class Stream:
    """The exchanges of one rank in one group; one object for all axes of the group.

    Args:
        rank: rank of this process in the group.
        size: size of the group.

    Attributes:
        axes: counter that numbers the axes of the group.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size
        self._past: tuple[int, ...] = ()
        self._expected: dict[tuple[int, ...], _Step] = {}
        self._open: tuple[Exchange, NextExchange] | None = None
        self.axes = itertools.count(1)

    def start(
        self, wish: NextExchange, rounds: Sequence[Round], pieces: Sequence[Sequence[Tensor]]
    ) -> Callable[[], list[list[Tensor]]]:
        """Start an exchange; the returned function waits for it.

        Args:
            wish: the exchange.
            rounds: lengths in bytes, at least one round.
            pieces: for each round, bytes of these lengths for each rank; then the tensor to sum.

        Raises:
            MismatchError: on all ranks, if one of them wants another exchange; here or in the
                returned function.
        """
        self.settle()
        step = _Step(wish.digest, tuple(rounds))
        expected = self._expected.get(self._past)
        is_foreseen = expected == step
        if not is_foreseen:
            hollow = (self._nothing(),) if expected is None else expected.rounds
            self._require(Exchange(wish, self._rank, hollow, None, has_heads=True), wish)
            if len(self._expected) >= _MOST:
                self._expected.clear()
            self._expected[self._past] = step
        self._past = (*self._past[1 - _PAST :], wish.digest)
        exchange = Exchange(wish, self._rank, rounds, pieces, has_heads=is_foreseen)
        self._open = (exchange, wish) if is_foreseen else None

        def finish() -> list[list[Tensor]]:
            if self._open is not None and self._open[0] is exchange:
                self.settle()
            return exchange.received()

        return finish

    def settle(self) -> None:
        """Compare the last started exchange, before another one starts."""
        if self._open is not None:
            (exchange, wish), self._open = self._open, None
            self._require(exchange, wish)

    def _require(self, exchange: Exchange, wish: NextExchange) -> None:
        if exchange.is_in_order():
            return
        self._past = ()
        self._expected.clear()
        raise wish.disagree(wish.call_notes)

    def _nothing(self) -> Round:
        return Round((0,) * self._size, (0,) * self._size)


_streams: weakref.WeakKeyDictionary[dist.ProcessGroup, Stream] = weakref.WeakKeyDictionary()


def stream_of(group: dist.ProcessGroup) -> Stream:
    """The stream of a group."""
    stream = _streams.get(group)
    if stream is None:
        stream = _streams[group] = Stream(dist.get_rank(group), dist.get_world_size(group))
    return stream
