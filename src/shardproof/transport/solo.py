"""`SoloTransport`: one rank alone; tensors are copied as if they had been sent."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import ShapeError
from shardproof.transport import portable
from shardproof.transport.base import Call, Finished, Order, Pending, Transport, Window
from shardproof.transport.ledger import Ledger


class SoloTransport(Transport):
    """The transport of degree 1."""

    name = "solo"
    rank = 0
    size = 1

    def __init__(self) -> None:
        self.ledger = Ledger()

    def exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        *,
        rounds: int,
        like: Tensor,
        call: Call,
    ) -> list[list[Tensor]]:
        """Return one empty list, because there is no other rank."""
        return [[]]

    @torch.no_grad()
    def all_gather(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call, outer: int = 1
    ) -> None:
        """Copy `x` into `out`."""
        if [x.numel()] != [outer * size for size in sizes] or x.shape != out.shape:
            raise ShapeError(
                f"{call}: cannot gather {tuple(x.shape)} into {tuple(out.shape)} with sizes "
                f"{list(sizes)} and {outer} rows; alone, all are the same."
            )
        out.copy_(x)

    @torch.no_grad()
    def start_sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> Pending:
        """Compute the sum at once."""
        portable.check(self, parts, order, out, call, windows)
        total = portable.add_up(order, parts)
        if windows is not None:
            window = windows[0]
            total = total.view(window.outer, window.size, window.inner)
            total = total[:, window.start : window.stop].reshape(-1)
        out.copy_(total)
        return Finished()

    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Return a list of the value."""
        return [value]
