"""`ThreadsTransport`: ranks as threads of one process, which read each other's tensors.

With the C core, ranks read each other's tensors in place, without the interpreter lock. Without
it, and on a GPU, a rank passes references and its `Call`, waits for the others, and reads their
tensors. Calls are compared each time, at no cost.

On a GPU all ranks use one device and its default stream: kernels run in the order in which they
were queued, and a rank queues its reads after the meeting.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof import c_modules
from shardproof.errors import MismatchError, UsageError
from shardproof.transport import portable
from shardproof.transport.base import Call, Order, Pending, Window
from shardproof.transport.incore import CoreTransport
from shardproof.transport.ledger import Ledger
from shardproof.transport.rendezvous import Rendezvous

# From so many bytes on, each rank adds one slice of the message and copies the other slices.
_SLICED_FROM = 256 * 1024


class ThreadsTransport(CoreTransport):
    """One rank's end of a rendezvous.

    Args:
        rendezvous: the object that the ranks of the axis share.
        rank: the rank.
    """

    name = "threads"

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        super().__init__(c_modules.shm(), rank, rendezvous.size, sliced_from=_SLICED_FROM)
        self._core = None if rendezvous.cores is None else rendezvous.cores[rank]
        self.ledger = Ledger()
        self._rendezvous = rendezvous

    def exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        *,
        rounds: int,
        like: Tensor,
        call: Call,
    ) -> list[list[Tensor]]:
        """Pass every rank references to its pieces, for all rounds at once."""
        _check_stream(like)
        offers = self._meet(call, outgoing)
        received: list[list[Tensor]] = [[] for _ in range(self.size)]
        for peer in range(self.size):
            if peer == self.rank:
                continue
            received[peer] = list(offers[peer][self.rank])
            lengths = [piece.numel() for piece in received[peer]]
            if lengths != list(incoming[peer]):
                raise MismatchError(
                    f"{call}: rank {peer} hands pieces of {lengths} to rank {self.rank}, which "
                    f"expects {list(incoming[peer])}. Both must derive them from the same cut."
                )
        return received

    def all_gather(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call, outer: int = 1
    ) -> None:
        """Copy the ranks' `x` into `out`, directly from their memory."""
        if self._core is not None and not out.is_cuda:
            self._rendezvous.calls[self.rank] = call
            super().all_gather(x, out, sizes, call=call, outer=outer)
            return
        self._gather_by_meeting(x, out, sizes, call, outer)

    @torch.no_grad()
    def _gather_by_meeting(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], call: Call, outer: int
    ) -> None:
        _check_stream(x)
        # A copy, which others may read after `x` has changed.
        parts: list[Tensor] = self._meet(call, x.clone())
        counts = [part.numel() for part in parts]
        lengths = [outer * size for size in sizes]
        # Every rank sees the same parts, so that all ranks raise or none does.
        if counts != lengths or out.numel() != sum(lengths):
            raise MismatchError(
                f"{call}: the ranks hand over {counts} elements where {lengths} are expected, "
                f"for a result of {out.numel()}. All must derive them from the same cut."
            )
        rows = [part.view(outer, -1) for part in parts if part.numel()]
        if rows:
            torch.cat(rows, 1, out=out.view(outer, -1))

    def start_sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> Pending:
        """Pass references to the parts; without the core nothing is done before `wait()`."""
        if self._core is not None and not out.is_cuda:
            self._rendezvous.calls[self.rank] = call
            return super().start_sum(parts, order, out, call=call, windows=windows)
        _check_stream(out)
        return _StartedSum(self, parts, order, out, call, windows)

    def sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> None:
        """Read directly from the other ranks' tensors into `out`."""
        if self._core is None or out.is_cuda:
            self.start_sum(parts, order, out, call=call, windows=windows).wait()
            return
        self._rendezvous.calls[self.rank] = call
        super().sum(parts, order, out, call=call, windows=windows)

    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Every rank's value itself, not a copy."""
        return self._meet(call, value)

    def part(self, ranks: Sequence[int]) -> "ThreadsTransport":
        """A transport of some of the ranks; all ranks call this, each with those of its own part.

        Args:
            ranks: two or more, with this rank among them.

        Returns:
            This rank's end; its rank is the place in `ranks`.

        Comm:
            setup none in the ledger: references go to all ranks, uncounted.
        """
        is_first = ranks[0] == self.rank
        offers = self.gather_objects(
            self._rendezvous.part(ranks) if is_first else None,
            call=Call("gather", "setup", "the parts of an axis"),
        )
        rendezvous: Rendezvous = offers[ranks[0]]
        part = ThreadsTransport(rendezvous, ranks.index(self.rank))
        if self.notes is None:
            part.notes = None
        rendezvous.attach(part)
        return part

    def _meet(self, call: Call, offer: Any) -> list[Any]:
        call_notes = self.take_notes()
        try:
            return self._rendezvous.meet(self.rank, call, offer, call_notes)
        except MismatchError:
            self.forget_notes()
            raise

    def _tick(self, waited: float, missing: list[int]) -> None:
        """Ask the rendezvous, which knows all ranks."""


class _StartedSum(portable.PortableSum):
    """A started sum in which every rank reads its slices from the others' parts."""

    @torch.no_grad()
    def wait(self) -> None:
        """Exchange and finish; with windows, wait until all have read this rank's parts."""
        self.receive = lambda: self._transport.exchange(
            self.outgoing(), self.incoming(), rounds=self.rounds, like=self.like, call=self._call
        )
        super().wait()
        if self._windows is not None:
            self._transport.gather_objects(None, call=self._call)


def waits_note() -> str:
    """Why ranks as threads wait in Python; empty if they wait in the C core."""
    return "" if c_modules.shm() is not None else f"ranks wait in Python: {c_modules.problem()}"


def _check_stream(x: Tensor) -> None:
    if x.is_cuda and torch.cuda.current_stream(x.device) != torch.cuda.default_stream(x.device):
        raise UsageError(
            f"ranks as threads share the default stream of {x.device}, and this rank is on "
            "another one. Leave the torch.cuda.stream() block before a collective, or use "
            "engine='processes'."
        )
