"""A tensor of a scene as it lies on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardproof.showing.moments import base_name
from shardproof.trace.step import Part

SUMMANDS = "summands"


@dataclass(frozen=True)
class Piece:
    """What one rank has of a tensor.

    Attributes:
        rank: whose.
        part: as its trace has it.
    """

    rank: int
    part: Part


@dataclass(frozen=True)
class Figure:
    """A tensor as it lies on all ranks.

    Attributes:
        name: as the ranks call it.
        placement: "Replicate", "Shard(d)" or "Partial"; "" if it is not known, or not alike.
        shape: of the whole tensor; of one rank's part if the placement is not known.
        dtype: as torch writes it, without the prefix.
        pieces: in rank order; a rank may have several summands.
        is_result: the step made it; else the step read it.
    """

    name: str
    placement: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    is_result: bool

    @property
    def is_alike(self) -> bool:
        """Whether every rank has the same, as far as the numbers are known.

        Where the placement is not known, the numbers must be, and be the same bit by bit.
        """
        parts = [piece.part for piece in self.pieces]
        if len({piece.rank for piece in self.pieces}) < len(parts):
            return False
        known = {repr((part.shape, part.values, part.corner)) for part in parts}
        if self.placement == "Replicate":
            return len(known) == 1
        are_whole = all(part.values is not None for part in parts)
        return not self.placement and len(known) == 1 and are_whole

    @property
    def is_broken(self) -> bool:
        """Whether ranks have different numbers of what must be the same on all of them."""
        return self.placement == "Replicate" and not self.is_alike

    @property
    def dim(self) -> int | None:
        """The dim that is cut."""
        if not self.placement.startswith("Shard"):
            return None
        return self.pieces[0].part.dim


def figure_of(pieces: Sequence[Piece], *, is_result: bool, name: str = "") -> Figure:
    """The tensor of which these are the pieces.

    Args:
        pieces: in rank order.
        is_result: the step made it.
        name: what the tensor is called, if its pieces do not say it.
    """
    parts = [piece.part for piece in pieces]
    placements = {part.placement for part in parts}
    placement = placements.pop() if len(placements) == 1 else ""
    shape, first = parts[0].shape, parts[0]
    if placement.startswith("Shard") and first.dim is not None:
        # Without a size, the parts are known to lie one after the other.
        size = sum(part.shape[first.dim] for part in parts) if first.size is None else first.size
        shape = (*shape[: first.dim], size, *shape[first.dim + 1 :])
    return Figure(
        name or _name(parts),
        placement,
        shape=shape,
        dtype=first.dtype,
        pieces=tuple(pieces),
        is_result=is_result,
    )


def _name(parts: Sequence[Part]) -> str:
    """What all call it; of nodes of a sum ("y, leaves 0-3") the sum."""
    names = {base_name(part) for part in parts}
    return names.pop() if len(names) == 1 else SUMMANDS
