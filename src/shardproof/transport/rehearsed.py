"""A transport for rehearsals: nothing is sent, and the ledger counts as if it had been.

It is used in planning: a step of a model on the meta device shows which collectives it makes and
their sizes. Data of other ranks is missing, so values that depend on it mean nothing.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardproof.transport.base import Call, Finished, Order, Pending, Transport, Window
from shardproof.transport.ledger import Ledger


class RehearsedTransport(Transport):
    """The transport of one rank of a larger degree, without the other ranks.

    Args:
        rank: the rank.
        size: the number of ranks.
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
        """Return pieces of the right sizes."""
        self.calls.append(call)
        return [[like.new_zeros(size) for size in sizes] for sizes in incoming]

    def all_gather(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call, outer: int = 1
    ) -> None:
        """Fill `out` with zeros."""
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
        """Fill `out` with zeros."""
        self.calls.append(call)
        out.detach().zero_()
        return Finished()

    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Return this rank's value for every rank."""
        return [value] * self.size
