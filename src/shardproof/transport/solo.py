"""One rank alone: nothing crosses, everything is copied as if it had."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import ShapeError
from shardproof.transport.base import Call, Transport
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
        """Nobody to exchange with: one empty list."""
        return [[]]

    @torch.no_grad()
    def all_gather(self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call) -> None:
        """Copy `x` into `out`."""
        if [x.numel()] != list(sizes) or x.shape != out.shape:
            raise ShapeError(
                f"{call}: cannot gather {tuple(x.shape)} into {tuple(out.shape)} with sizes "
                f"{list(sizes)}; alone, all three are the same."
            )
        out.copy_(x)

    @torch.no_grad()
    def all_reduce(self, x: Tensor, *, call: Call) -> Tensor:
        """A copy of `x`."""
        return x.clone()

    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """The value alone."""
        return [value]
