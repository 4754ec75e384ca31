"""Sums over a cut dim, and sums that broadcasting hides: both in an order that no degree changes.

Torch sums a gradient over the dims that an operand was broadcast along, in an order that depends on
the shape of what is held. So an operand is broadcast here, before it is used: its gradient is
folded over the dims that are not cut (`numerics/sums.py`), then inside each leaf of the cut dim,
and leaves are added by the canonical tree. An index that several ranks hold is counted by its
owner.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof import comm, observing, operators
from shardproof.autograd import once_differentiable
from shardproof.errors import ShapeError
from shardproof.numerics.arithmetic import INVARIANT
from shardproof.numerics.precision import node_dtype
from shardproof.numerics.sums import sum_rows
from shardproof.observing import PARTIAL, Operand, StepEvent
from shardproof.ops.unit_moves import checked_dim, is_compared
from shardproof.ops.unit_split import UnitSplit
from shardproof.tree import node_name, nodes_of_run

_SMALL = 1 << 16  # elements that are copied sooner than summed leaf by leaf


def sum_held(x: Tensor, place: UnitSplit, like: Tensor, direction: str) -> Tensor:
    """The sum over a cut dim that comes first. No autograd.

    Args:
        x: (held, N), Shard(0).
        place: of the first dim.
        like: any tensor of the result's dtype and device.
        direction: for the ledger.
    Returns:
        (N,), Replicate, a new tensor.
    Comm:
        `direction` one all_reduce of (N,).
    """
    wide = node_dtype(x.dtype)
    if not place.arithmetic.is_invariant:
        sums: Iterable[Tensor] = [place.owned.of(x, 0).sum(0, dtype=wide)]
    else:
        sums = _leaf_sums(x, place, wide)
    parts = place.arithmetic.parts(sums, place.split.leaves)
    if observing.is_on():
        _tell_parts(x, place, parts, direction)
    started = place.split.start_sum(parts, shape=x.shape[1:], like=like, direction=direction)
    return started.wait()


def _tell_parts(x: Tensor, place: UnitSplit, parts: Sequence[Tensor], direction: str) -> None:
    """Tell observers of the nodes that this rank has added."""
    if not place.arithmetic.is_invariant:
        return
    for node, part in zip(nodes_of_run(place.num_leaves, place.run), parts, strict=True):
        output = Operand(f"y, {node_name(node)}", part, PARTIAL, node)
        inputs = [Operand("x", x, place.placement(0))]
        what = f"y = the sum of x over the cut dim, {node_name(node)}"
        observing.tell(StepEvent("sum of rows", direction, place.who, what, inputs, output))


def _leaf_sums(x: Tensor, place: UnitSplit, dtype: torch.dtype) -> Iterable[Tensor]:
    """(N,) for every leaf that this rank owns."""
    pieces, leaves = place.pieces, len(place.run)
    if place.even_leaf and x.numel() <= _SMALL:
        # All leaves in one call: every one of them is folded as it would be alone.
        columns = x.reshape(leaves, place.even_leaf, x.shape[1]).transpose(0, 1)
        rows = columns.reshape(place.even_leaf, leaves * x.shape[1])
        return sum_rows(rows, dtype=dtype).view(leaves, x.shape[1]).unbind(0)
    brought = pieces.bring(x, 0)
    return (
        sum_rows(_rows(brought, [at for at in of_leaf if at.stop > at.start]), dtype=dtype)
        for of_leaf in zip(*pieces.slices, strict=True)
    )


def _rows(x: Tensor, pieces: Sequence[slice]) -> Tensor:
    """A leaf's rows, in the order of the dim."""
    if len(pieces) == 1:
        return x[pieces[0]]
    return torch.cat([x[each] for each in pieces]) if pieces else x[:0]


def _broadcast_dims(source_shape: torch.Size, shape: torch.Size) -> list[int]:
    """The dims of `shape` that a tensor of the shape `source_shape` is broadcast along."""
    missing = len(shape) - len(source_shape)
    return [
        dim
        for dim in range(len(shape))
        if dim < missing or (source_shape[dim - missing] == 1 and shape[dim] != 1)
    ]


class _Spread(torch.autograd.Function):
    """A broadcast view forward; a fold, leaf sums and one all_reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, dim: int, place: UnitSplit) -> Tensor:
        ctx.shape, ctx.dim, ctx.place = x.shape, dim, place
        return x.expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        place, dim, wide = ctx.place, ctx.dim, node_dtype(grad_y.dtype)
        dims = [each for each in _broadcast_dims(ctx.shape, grad_y.shape) if each != dim]
        x = grad_y
        if dims:
            x = place.arithmetic.fold(grad_y, tuple(dims), dtype=wide)
        x = x.movedim(dim - sum(each < dim for each in dims), 0)
        grad = sum_held(x.reshape(x.shape[0], x.shape[1:].numel()), place, grad_y, "backward")
        return grad.view(ctx.shape), None, None, None


class _SumCut(torch.autograd.Function):
    """Leaf sums and one all_reduce forward, a broadcast backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, place: UnitSplit, dtype: torch.dtype) -> Tensor:
        ctx.dim, ctx.place, ctx.shape, ctx.dtype = dim, place, x.shape, x.dtype
        rows = x.movedim(dim, 0)
        shape = rows.shape[1:]
        like = x.new_empty(0, dtype=dtype)
        y = sum_held(rows.reshape(x.shape[dim], shape.numel()), place, like, "forward")
        return operators.resized(y, shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.place.axis.note(grad_y, who=ctx.place.who, what="gradient of the sum")
        grad = grad_y.to(ctx.dtype).unsqueeze(ctx.dim).expand(ctx.shape)
        return grad, None, None, None


def spread(x: Tensor, shape: Sequence[int], dim: int, place: UnitSplit) -> Tensor:
    """A whole tensor broadcast along a cut dim: a view forward, its sum by one all_reduce backward.

    Args:
        x: (*), Replicate, broadcastable to `shape`; of size 1 along `dim`, or without it.
        shape: (*, held, *): what it is used with on this rank.
        dim: that is cut, counted in `shape` from either end.
        place: of that dim.
    Returns:
        `shape`, Shard(dim), a view of `x`; its gradient is expected to be complete at every rank
        that holds an index.
    Raises:
        ShapeError: the shapes do not fit, or `shape` is not what this rank holds.
    Comm:
        forward none; backward one all_reduce of grad_x (*).
    """
    size = torch.Size(shape)
    dim = _checked_shape(x, size, dim, place)
    if is_compared(x):
        place.axis.note(x, who=place.who)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.expand(size)
    return _Spread.apply(x, size, dim, place)


def _checked_shape(x: Tensor, shape: torch.Size, dim: int, place: UnitSplit) -> int:
    """`dim` from the front; raises unless `x` broadcasts to what this rank holds."""
    front = dim + len(shape) if dim < 0 else dim
    missing = len(shape) - x.dim()
    is_held = 0 <= front < len(shape) and shape[front] == place.length
    is_one = missing >= 0 and (front < missing or x.shape[front - missing] == 1)
    if not (is_held and is_one):
        raise ShapeError(
            f"{place.who} on {place.axis}: a tensor of shape {tuple(x.shape)} cannot be spread to "
            f"{tuple(shape)} along dim {dim}, of which this rank holds {place.length}. Give a "
            "tensor of size 1 there; what has the whole dim is taken, not spread."
        )
    return front


def expand(x: Tensor, shape: Sequence[int], place: UnitSplit | None = None) -> Tensor:
    """Broadcast on this rank alone: a view forward, a fold in a fixed order backward.

    Args:
        x: broadcastable to `shape`, any placement; what is cut is held already.
        shape: of what it is used with on this rank.
        place: whose numerics; None: invariant.
    Returns:
        `shape`, a view of `x`, or `x` itself if it has that shape.
    Comm:
        forward none; backward none.
    """
    size = torch.Size(shape)
    if x.shape == size:
        return x
    return (INVARIANT if place is None else place.arithmetic).expand(x, size)


def fold(
    x: Tensor, dims: int | Sequence[int], *, keepdim: bool = False, place: UnitSplit | None = None
) -> Tensor:
    """Sum over dims that are not cut, in an order that depends on their sizes alone.

    Args:
        x: (*), any placement.
        dims: one or more, none of which is cut; counted from either end.
        keepdim: leave them with size 1.
        place: whose numerics; None: invariant.
    Returns:
        The sum, placed as `x`; int64 of whole numbers and bools.
    Comm:
        forward none; backward none.
    """
    dim_sequence = (dims,) if isinstance(dims, int) else dims
    dim_tuple = tuple(sorted(each % max(x.dim(), 1) for each in dim_sequence))
    if not x.is_floating_point():
        return x.sum(dim_tuple, keepdim=keepdim) if dim_tuple and x.dim() else x.long()
    if not dim_tuple or not x.dim():
        return x.clone()
    return (INVARIANT if place is None else place.arithmetic).fold(x, dim_tuple, keepdim=keepdim)


def sum_cut(
    x: Tensor,
    dim: int,
    place: UnitSplit,
    *,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum over a cut dim: one all_reduce forward, a broadcast backward.

    Args:
        x: (*, held, *), Shard(dim).
        dim: counted from either end.
        place: of that dim.
        keepdim: leave it with size 1.
        dtype: of the result; that of `x` if not given, int64 of whole numbers and bools.
    Returns:
        (*), Replicate, without `dim`; its gradient is expected to be Replicate.
    Raises:
        ShapeError: `x` is not what this rank holds.
    Comm:
        forward one all_reduce of y (*); backward none.
    """
    dim = checked_dim(x, dim, place, is_whole=False)
    if not x.is_floating_point():
        part = place.owned.of(x, dim).sum(dim, dtype=torch.int64)
        started = comm.start_all_reduce(part, place.axis, direction="forward", who=place.who)
        y = started.wait() if dtype is None else started.wait().to(dtype)
    else:
        y = _SumCut.apply(x, dim, place, dtype or x.dtype)
    place.axis.note_result(y, who=place.who)
    return y.unsqueeze(dim) if keepdim else y


def mean_cut(x: Tensor, dim: int, place: UnitSplit, *, keepdim: bool = False) -> Tensor:
    """Mean over a cut dim: one all_reduce forward, a broadcast backward.

    Args:
        x: (*, held, *), Shard(dim), of a floating dtype.
        dim: counted from either end.
        place: of that dim.
        keepdim: leave it with size 1.
    Returns:
        (*), Replicate, without `dim`; its gradient is expected to be Replicate.
    Raises:
        ShapeError: `x` is not what this rank holds.
    Comm:
        forward one all_reduce of y (*); backward none.
    """
    y = sum_cut(x, dim, place, keepdim=keepdim, dtype=node_dtype(x.dtype))
    return (y / place.size).to(x.dtype)
