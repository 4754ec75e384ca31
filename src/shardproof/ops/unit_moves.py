"""From a cut dim to the whole one and back: indices move, nothing is added.

A rank sends the indices that it owns, and every index has one owner. A gradient is complete at
every rank that holds an index, so the owner's alone is taken.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.comm.runs_of_indices import all_gather_sizes
from shardproof.errors import ShapeError
from shardproof.ops.unit_split import UnitSplit

_NOT_COMPARED = "_shardproof_not_compared"


class _Gather(torch.autograd.Function):
    """all_gather forward, a local selection backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, place: UnitSplit) -> Tensor:
        ctx.dim, ctx.place = dim, place
        return joined(x, dim, place, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        place: UnitSplit = ctx.place
        place.axis.note(grad_y, who=place.who, what="gradient of what was gathered")
        return place.held.copy(grad_y, ctx.dim), None, None


class _Take(torch.autograd.Function):
    """A local selection forward, all_gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, place: UnitSplit) -> Tensor:
        ctx.dim, ctx.place = dim, place
        return place.held.copy(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return joined(grad_y, ctx.dim, ctx.place, "backward"), None, None


def joined(x: Tensor, dim: int, place: UnitSplit, direction: str) -> Tensor:
    """The whole dim from what the ranks own of it. No autograd.

    Args:
        x: (*, held, *), Shard(dim).
        dim: counted from the front.
        place: of that dim.
        direction: for the ledger.
    Returns:
        (*, size, *), Replicate, a new tensor.
    Comm:
        `direction` one all_gather of (*, size, *).
    """
    own = place.owned.of(x, dim)
    side_by_side = all_gather_sizes(
        own, place.axis, dim=dim, sizes=place.sizes, direction=direction, who=place.who
    )
    return place.order.of(side_by_side, dim)


def checked_dim(x: Tensor, dim: int, place: UnitSplit, *, is_whole: bool) -> int:
    """`dim`, counted from the front, after a look at the length of `x` along it.

    Args:
        x: (*, size, *) if `is_whole`, else (*, held, *).
        dim: counted from either end.
        place: of that dim.
        is_whole: which of the two `x` should be.
    Raises:
        ShapeError: `x` has no such dim, or another length.
    """
    length = place.size if is_whole else place.length
    if -x.dim() <= dim < x.dim() and x.shape[dim] == length:
        return dim % x.dim()
    part = f"the whole dim has {place.size}" if is_whole else f"this rank holds {length}"
    raise ShapeError(
        f"{place.who} on {place.axis}: dim {dim} of shape {tuple(x.shape)} was given where "
        f"{part}. Give the tensor that the place describes."
    )


def not_compared(x: Tensor) -> Tensor:
    """Mark a tensor that ranks without work do not have: `spread` and `take` do not compare it.

    Args:
        x: (*), Replicate on the ranks that use it.
    Returns:
        `x`.
    """
    setattr(x, _NOT_COMPARED, True)
    return x


def is_compared(x: Tensor) -> bool:
    """Whether the ranks compare a tensor that each of them is to have."""
    return not getattr(x, _NOT_COMPARED, False)


def gather(x: Tensor, dim: int, place: UnitSplit) -> Tensor:
    """What the ranks hold of a cut dim to the whole dim: all_gather forward, selection backward.

    Args:
        x: (*, held, *), Shard(dim).
        dim: counted from either end.
        place: of that dim.
    Returns:
        (*, size, *), Replicate, a new tensor; its gradient is expected to be Replicate.
    Raises:
        ShapeError: `x` is not what this rank holds.
    Comm:
        forward one all_gather of (*, size, *); backward none.
    """
    dim = checked_dim(x, dim, place, is_whole=False)
    y: Tensor = _Gather.apply(x, dim, place)
    place.axis.note_result(y, who=place.who)
    return y


def take(x: Tensor, dim: int, place: UnitSplit) -> Tensor:
    """What this rank holds of a whole dim: a selection forward, all_gather backward.

    Args:
        x: (*, size, *), Replicate.
        dim: counted from either end.
        place: of that dim.
    Returns:
        (*, held, *), Shard(dim), a new tensor; its gradient is expected to be complete at every
        rank that holds an index.
    Raises:
        ShapeError: `x` is not whole.
    Comm:
        forward none; backward one all_gather of (*, size, *).
    """
    dim = checked_dim(x, dim, place, is_whole=True)
    if is_compared(x):
        place.axis.note(x, who=place.who)
    return _Take.apply(x, dim, place)


def held_part(x: Tensor, dim: int, place: UnitSplit) -> Tensor:
    """What this rank holds of a whole dim, without a gradient that crosses ranks.

    Args:
        x: (*, size, *), Replicate: a mask, an index, a buffer.
        dim: counted from either end.
        place: of that dim.
    Returns:
        (*, held, *), Shard(dim); a view where what is held is one run.
    Raises:
        ShapeError: `x` is not whole.
    Comm:
        forward none; backward none.
    """
    return place.held.of(x, checked_dim(x, dim, place, is_whole=True))
