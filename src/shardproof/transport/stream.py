"""All exchanges of one process group, compared by what travels anyway.

A backend such as gloo does not look at what it carries: ranks that call two layers in another order
add up each other's numbers, and a message of another length aborts the process. Asking first costs
as much as a small exchange. Here each message begins with 16 bytes: the digest of the call and of
what was noted before it. For that the lengths must fit, also between ranks that disagree. So each
rank keeps which exchange has followed which, which is the same on all ranks as long as they agree:

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
from shardproof.transport.notes import Noted

_HEAD = 16  # bytes before each message: two digests; a multiple of every element's size
_PAST = 3  # calls by which the next one is foreseen
_MOST = 4096  # of such pasts are kept

Finish = Callable[[], None]
# (what arrives, what is sent, bytes from each rank, bytes to each rank): begun; the rest waits.
Post = Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], Finish]


class NextExchange(NamedTuple):
    """What this rank is about to do.

    Attributes:
        digest: of the call and of the axis.
        noted: before it.
        post: begins an all-to-all of bytes on the group.
        reduce: begins the backend's own sum over the group, in place.
        disagree: all ranks come here; the error to raise.
    """

    digest: int
    noted: Noted
    post: Post
    reduce: Callable[[Tensor], Finish]
    disagree: Callable[[Noted], MismatchError]


class Round(NamedTuple):
    """One message for each rank, by their bytes.

    Attributes:
        sent, received: to and from each rank; 0 for the own one.
        reduced, dtype: elements that the backend sums, beside that, and of what. It cuts them into
            parts by their number: bytes alone would not say where.
        is_for_heads: it is there for the digests alone, and left out where they have been compared.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    reduced: int = 0
    dtype: torch.dtype = torch.uint8
    is_for_heads: bool = False


class _Step(NamedTuple):
    """An exchange, as far as it is the same whenever it comes back."""

    digest: int
    rounds: tuple[Round, ...]


class Exchange:
    """Messages on their way, one all-to-all for each round.

    Args:
        wish: what this rank is about to do.
        rank: of this process.
        rounds: the bytes that travel.
        pieces: for each round, bytes for each rank, and what is summed; None: nothing but zeros.
        has_heads: messages of the first round begin with the digests.
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
        self._kept: Tensor | None = None
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
            self._kept = x
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
        digests = [self._wish.digest - (1 << 63), self._wish.noted.value - (1 << 63)]
        return torch.tensor(digests, device="cpu").view(torch.uint8)

    def is_in_order(self) -> bool:
        """Wait; whether all ranks want what this one wants."""
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
        """Wait; for each round the bytes from each rank, none from the own one."""
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
    """The exchanges of one group as one rank makes them; one object for all axes of the group.

    Args:
        rank: of this process in the group.
        size: of the group.

    Attributes:
        axes: numbers the axes that are made of the group.
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
        """Begin an exchange; what is returned waits for it.

        Args:
            wish: what it is.
            rounds: lengths in bytes, at least one round.
            pieces: for each round, bytes for each rank, of those lengths; then what is summed.

        Raises:
            MismatchError: on all ranks, if one of them wants another exchange; here, or when it is
                waited for.
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
        """Compare the exchange that was begun last: what follows relies on it."""
        if self._open is not None:
            (exchange, wish), self._open = self._open, None
            self._require(exchange, wish)

    def _require(self, exchange: Exchange, wish: NextExchange) -> None:
        if exchange.is_in_order():
            return
        self._past = ()
        self._expected.clear()
        raise wish.disagree(wish.noted)

    def _nothing(self) -> Round:
        return Round((0,) * self._size, (0,) * self._size)


_streams: weakref.WeakKeyDictionary[dist.ProcessGroup, Stream] = weakref.WeakKeyDictionary()


def stream_of(group: dist.ProcessGroup) -> Stream:
    """The one stream of a group."""
    stream = _streams.get(group)
    if stream is None:
        stream = _streams[group] = Stream(dist.get_rank(group), dist.get_world_size(group))
    return stream
