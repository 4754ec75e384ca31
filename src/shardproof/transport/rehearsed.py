"""One rank of many without the others: nothing crosses, and the ledger counts as if it had.

For plans: a step of a model on the meta device says which collectives it makes and how large they
are. What would come from others is left as it is, so numbers that depend on it mean nothing.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardproof.transport.base import Call, Finished, Order, Pending, Transport, Window
from shardproof.transport.ledger import Ledger


class RehearsedTransport(Transport):
    """The transport of a rank that is alone and computes its part of a larger degree.

    Args:
        rank: which.
        size: how many there would be.
    """

    name = "rehearsed"

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.ledger = Ledger()
        self.calls: list[Call] = []

    def exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        *,
        rounds: int,
        like: Tensor,
        call: Call,
    ) -> list[list[Tensor]]:
        """Pieces of the right sizes."""
        self.calls.append(call)
        return [[like.new_zeros(size) for size in sizes] for sizes in incoming]

    def all_gather(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call, outer: int = 1
    ) -> None:
        """`out` is zeros."""
        self.calls.append(call)
        out.detach().zero_()

    def start_sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> Pending:
        """`out` is zeros."""
        self.calls.append(call)
        out.detach().zero_()
        return Finished()

    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """The own value, for every rank."""
        return [value] * self.size
