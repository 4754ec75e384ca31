"""Ranks as threads of one process: tensors are lent, never copied to be sent.

A rank hands over references and its `Call`, meets the others, and reads what they handed over.
That is safe because nothing that was handed over is written again (`transport/base.py`). Calls
are compared at every meeting, which costs nothing: all of them lie in one place.

On a GPU all ranks use one device and its default stream: kernels then run in the order in which
they were queued, and a rank queues its reads after the meeting.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import MismatchError, UsageError
from shardproof.leaves import share
from shardproof.transport.base import Call, Transport
from shardproof.transport.ledger import Ledger
from shardproof.transport.rendezvous import Rendezvous

# Up to so many elements every rank adds up the whole sum: cheaper than a second meeting.
_WHOLE_SUM = 8192


class ThreadsTransport(Transport):
    """One rank's end of a rendezvous.

    Args:
        rendezvous: shared by the ranks of the axis.
        rank: whose end this is.
    """

    name = "threads"

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self.rank = rank
        self.size = rendezvous.size
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
        """Lend every rank its pieces; all rounds at once."""
        _check_stream(like)
        offers = self._rendezvous.meet(self.rank, call, outgoing)
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

    @torch.no_grad()
    def all_gather(self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call) -> None:
        """Copy the ranks' `x` into `out`, straight from their memory."""
        _check_stream(x)
        self._join(x, out, sizes, call)

    @torch.no_grad()
    def all_reduce(self, x: Tensor, *, call: Call) -> Tensor:
        """Sum in rank order: each rank its slice, then the slices are gathered."""
        _check_stream(x)
        partials: list[Tensor] = self._rendezvous.meet(self.rank, call, x)
        if x.numel() <= _WHOLE_SUM:
            return _add_up(partials)
        bounds = share(x.numel(), self.size)
        mine = bounds[self.rank]
        part = _add_up([partial[mine.start : mine.stop] for partial in partials])
        total = torch.empty_like(x)
        self._join(part, total, [len(bound) for bound in bounds], call)
        return total

    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Every rank's value itself, not a copy."""
        return self._rendezvous.meet(self.rank, call, value)

    def _join(self, x: Tensor, out: Tensor, sizes: Sequence[int], call: Call) -> None:
        parts: list[Tensor] = self._rendezvous.meet(self.rank, call, x)
        found = [part.numel() for part in parts]
        # Every rank sees the same parts, so that all raise or none does.
        if found != list(sizes) or out.numel() != sum(sizes):
            raise MismatchError(
                f"{call}: the ranks hand over {found} elements where {list(sizes)} are expected, "
                f"for a result of {out.numel()}. All must derive them from the same cut."
            )
        torch.cat(parts, out=out)


def _add_up(partials: Sequence[Tensor]) -> Tensor:
    total = partials[0].clone()
    for partial in partials[1:]:
        total.add_(partial)
    return total


def _check_stream(x: Tensor) -> None:
    if x.is_cuda and torch.cuda.current_stream(x.device) != torch.cuda.default_stream(x.device):
        raise UsageError(
            f"ranks as threads share the default stream of {x.device}, and this rank is on "
            "another one. Leave the torch.cuda.stream() block before a collective, or use "
            "engine='processes'."
        )
