"""The protocol between collectives and whatever carries their bytes.

A transport moves one-dimensional contiguous tensors and small Python values between the ranks of
one axis. It knows nothing of leaves, trees, autograd or layers. What `comm` hands to it is never
written again by anybody, so that a transport may lend references instead of copying.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import MismatchError, RankError
from shardproof.transport.ledger import Ledger


@dataclass(frozen=True)
class Call:
    """What one collective is: equal on all ranks, or the ranks disagree.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter", "gather", "exchange".
        direction: one of `ledger.DIRECTIONS`.
        who: the layer or function that asked, for messages.
        shape: the global shape of the result.
        dtype: of what travels.
        detail: anything else that must agree (a cut, a plan's digest).
    """

    kind: str
    direction: str
    who: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    detail: str = ""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype is not None else "object"
        detail = f" [{self.detail}]" if self.detail else ""
        who = f" of {self.who}" if self.who else ""
        return f"{self.direction} {self.kind}{who}: {dtype} {tuple(self.shape)}{detail}"


class PeerError(RankError):
    """What a rank sees of a failure elsewhere: a symptom, behind which launchers look."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_peer_error, (str(self), self.rank))


def _peer_error(message: str, rank: int | None) -> PeerError:
    return PeerError(message, rank=rank)


def mismatch(descriptions: Sequence[str]) -> MismatchError:
    """The error that every rank raises when the ranks disagree about one collective.

    Args:
        descriptions: what each rank was about to do, in rank order; not all equal.
    """
    ranks: dict[str, list[int]] = {}
    for rank, description in enumerate(descriptions):
        ranks.setdefault(description, []).append(rank)
    sides = [f"{name_ranks(who)}: {description}" for description, who in ranks.items()]
    return MismatchError(
        f"the ranks disagree about one collective. {'; '.join(sides)}. All ranks must make the "
        "same calls in the same order, with the same shapes and dtypes."
    )


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks for a message.

    >>> name_ranks([0, 2, 3])
    'ranks 0, 2 and 3'
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


class Transport(ABC):
    """Carries bytes between the ranks of one axis; one object per rank.

    Attributes:
        name: "solo", "threads", "gloo", "nccl".
        rank, size: this rank's place on the axis.
        ledger: what has crossed so far.
    """

    name: str
    rank: int
    size: int
    ledger: Ledger

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
            rounds: the largest number of pieces that any rank has for any other, the same on all
                ranks; a transport that moves one piece per pair at a time needs so many rounds.
            like: any tensor of the dtype and device that travel.
            call: what this is.

        Returns:
            For each rank, its pieces in order; an empty list for the own rank. They may be
            references to the sender's memory: read them, never write them.
        """

    @abstractmethod
    def all_gather(self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call) -> None:
        """Fill `out` with the ranks' `x` in rank order.

        Args:
            x: (sizes[rank],), contiguous.
            out: (sum(sizes),), contiguous, written.
            sizes: every rank's length; they may differ and may be 0.
            call: what this is.
        """

    @abstractmethod
    def all_reduce(self, x: Tensor, *, call: Call) -> Tensor:
        """Sum of the ranks' `x` (1-D, contiguous), as a new tensor, in the transport's order."""

    @abstractmethod
    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Every rank's small picklable value, in rank order, on every rank."""
