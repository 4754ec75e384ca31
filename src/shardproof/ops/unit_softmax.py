"""What looks along a whole cut dim: the largest, softmax, and the loss of classes that are cut.

A dim that is one plain run for each rank goes through `ops/vocabulary.py`, which gathers a
few numbers for every leaf. Of other dims the logits are gathered.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.comm.runs_of_indices import all_gather_sizes
from shardproof.numerics.precision import widen
from shardproof.numerics.sums import sum_all, sum_rows
from shardproof.ops.class_targets import Reduction, check_reduction, counting_rows, reduce_rows
from shardproof.ops.unit_moves import checked_dim, gather, take
from shardproof.ops.unit_split import UnitSplit
from shardproof.ops.vocabulary import vocab_cross_entropy, vocab_log_softmax


def _best(x: Tensor, dim: int, place: UnitSplit, is_min: bool) -> tuple[Tensor, Tensor]:
    """The largest value over a cut dim, or the smallest, and the first index that has it."""
    own = place.owned.of(x, dim)
    indices = place.owned.of(place.held.on(x.device), 0)
    if len(indices):
        value = own.amin(dim) if is_min else own.amax(dim)
        is_best = own == value.unsqueeze(dim)
        if x.is_floating_point():  # a NaN is the largest, and equal to nothing
            is_best |= own.isnan()
        places = torch.where(is_best, _along(indices, dim, x.dim()), place.size)
        value, index = value.unsqueeze(0), places.amin(dim).unsqueeze(0)
    else:
        shape = [size for each, size in enumerate(x.shape) if each != dim]
        value = x.new_empty(0, *shape)
        index = x.new_empty(0, *shape, dtype=torch.int64)
    block_sizes = tuple(int(size > 0) for size in place.sizes)
    values, places = (
        all_gather_sizes(
            each.contiguous(),
            place.axis,
            dim=0,
            sizes=block_sizes,
            direction="forward",
            who=place.who,
        )
        for each in (value, index)
    )
    value = values.amin(0) if is_min else values.amax(0)
    is_best = values == value
    if x.is_floating_point():
        is_best |= values.isnan()
    return value, torch.where(is_best, places, place.size).amin(0)


class _Max(torch.autograd.Function):
    """Two all_gathers of partial maxima forward; the gradient goes to the index backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, place: UnitSplit, is_min: bool
    ) -> tuple[Tensor, Tensor]:
        value, index = _best(x, dim, place, is_min)
        ctx.dim, ctx.place, ctx.shape = dim, place, x.shape
        ctx.save_for_backward(index)
        ctx.mark_non_differentiable(index)
        return value, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.place.axis.note(grad, who=ctx.place.who, what="gradient of the largest")
        (index,) = ctx.saved_tensors
        held = _along(ctx.place.held.on(grad.device), ctx.dim, len(ctx.shape))
        is_best = held == index.unsqueeze(ctx.dim)
        return torch.where(is_best, grad.unsqueeze(ctx.dim), 0), None, None, None


class _Amax(torch.autograd.Function):
    """Partial maxima and how many equal them gathered forward; shared evenly backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, place: UnitSplit, is_min: bool) -> Tensor:
        value, _ = _best(x, dim, place, is_min)
        ctx.dim, ctx.place = dim, place
        ctx.save_for_backward(x, value)
        if ctx.needs_input_grad[0]:
            count = (place.owned.of(x, dim) == value.unsqueeze(dim)).sum(dim)
            counts = all_gather_sizes(
                count.unsqueeze(0),
                place.axis,
                dim=0,
                sizes=(1,) * place.axis.size,
                direction="forward",
                who=place.who,
            )
            ctx.count = counts.sum(0)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.place.axis.note(grad, who=ctx.place.who, what="gradient of the largest")
        x, value = ctx.saved_tensors
        share = (grad / ctx.count).unsqueeze(ctx.dim)
        return torch.where(x == value.unsqueeze(ctx.dim), share, 0), None, None, None


def _along(indices: Tensor, dim: int, dims: int) -> Tensor:
    """Indices of one dim, as they broadcast with a tensor of `dims` dims."""
    return indices.view([-1 if each == dim else 1 for each in range(dims)])


def max_cut(
    x: Tensor, dim: int, place: UnitSplit, *, keepdim: bool = False, is_min: bool = False
) -> tuple[Tensor, Tensor]:
    """Largest value over a cut dim, and where: two all_gathers forward, to that index backward.

    Args:
        x: (*, held, *), Shard(dim).
        dim: counted from either end.
        place: of that dim.
        keepdim: leave it with size 1.
        is_min: the smallest instead.
    Returns:
        Values and indices in the whole dim, the first of equals: (*) each, Replicate; the gradient
        of the values is expected to be Replicate.
    Raises:
        ShapeError: `x` is not what this rank holds.
    Comm:
        forward one all_gather of values (*, ranks); forward one all_gather of int64 (*, 2 * ranks);
        backward none.
    """
    dim = checked_dim(x, dim, place, is_whole=False)
    value, index = _Max.apply(x, dim, place, is_min)
    return (value.unsqueeze(dim), index.unsqueeze(dim)) if keepdim else (value, index)


def amax_cut(
    x: Tensor, dim: int, place: UnitSplit, *, keepdim: bool = False, is_min: bool = False
) -> Tensor:
    """Largest value over a cut dim; its gradient is shared evenly among equals.

    Args:
        x: (*, held, *), Shard(dim).
        dim: counted from either end.
        place: of that dim.
        keepdim: leave it with size 1.
        is_min: the smallest instead.
    Returns:
        (*), Replicate; its gradient is expected to be Replicate.
    Raises:
        ShapeError: `x` is not what this rank holds.
    Comm:
        forward one all_gather of values (*, ranks); forward one all_gather of int64 (*, 2 * ranks);
        backward none.
        a gradient is wanted: forward also one all_gather of int64 (*, 2 * ranks).
    """
    dim = checked_dim(x, dim, place, is_whole=False)
    value: Tensor = _Amax.apply(x, dim, place, is_min)
    return value.unsqueeze(dim) if keepdim else value


def _log_softmax(x: Tensor, place: UnitSplit) -> Tensor:
    """Log-softmax of the last dim, whole, in fp32 or fp64."""
    wide = widen(x)
    return place.arithmetic.log_softmax(wide)


def log_softmax_cut(x: Tensor, dim: int, place: UnitSplit) -> Tensor:
    """Log-softmax over a cut dim.

    Args:
        x: (*, held, *), Shard(dim), of a floating dtype.
        dim: counted from either end.
        place: of that dim.
    Returns:
        (*, held, *), Shard(dim); its gradient is expected to be complete at every holder.
    Raises:
        ShapeError: `x` is not what this rank holds.
    Comm:
        place.plain: forward one all_gather of (blocks, 2, rows); backward one all_reduce of (rows).
        other: forward one all_gather of (*, size); backward one all_gather of (*, size).
    """
    dim = checked_dim(x, dim, place, is_whole=False)
    last = x.movedim(dim, -1)
    rows = last.reshape(last.shape[:-1].numel(), last.shape[-1])
    if place.plain is not None:
        y = vocab_log_softmax(
            rows, axis=place.axis, cut=place.plain, scheme=place.scheme, who=place.who
        )
    else:
        y = take(_log_softmax(gather(rows, 1, place), place).to(x.dtype), 1, place)
    return y.view(last.shape).movedim(-1, dim)


def softmax_cut(x: Tensor, dim: int, place: UnitSplit) -> Tensor:
    """Softmax over a cut dim.

    Args:
        x: (*, held, *), Shard(dim), of a floating dtype.
        dim: counted from either end.
        place: of that dim.
    Returns:
        (*, held, *), Shard(dim); its gradient is expected to be complete at every holder.
    Raises:
        ShapeError: `x` is not what this rank holds.
    Comm:
        place.plain: forward one all_gather of (blocks, 2, rows); backward one all_reduce of (rows).
        other: forward one all_gather of (*, size); backward one all_gather of (*, size).
    """
    return log_softmax_cut(widen(x), dim, place).exp().to(x.dtype)


def cross_entropy_cut(
    logits: Tensor,
    target: Tensor,
    place: UnitSplit,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of logits whose classes are cut.

    Args:
        logits: (rows, held classes), Shard(-1).
        target: (rows,), Replicate; class indices of all classes, int64.
        place: of the classes.
        ignore_index: rows with this target count for nothing.
        reduction: "mean" over the rows that count, "sum", or "none".
        label_smoothing: share of every target that is spread evenly over all classes.
        weight: (classes,), Replicate: of every class, or None.
    Returns:
        (), or (rows,) for "none"; Replicate; its gradient is expected to be Replicate.
    Raises:
        ShapeError: the shapes do not fit each other, or the logits are not what this rank holds.
        UsageError: an option makes no sense, or a target is no class index.
    Comm:
        place.plain, no weight: forward one all_gather of (blocks, 3, rows); backward none.
        the same with label_smoothing: forward one all_gather of (blocks, 4, rows); backward none.
        other: forward one all_gather of (rows, classes); backward none.
    """
    if place.plain is not None and weight is None:
        return vocab_cross_entropy(
            logits,
            target,
            axis=place.axis,
            cut=place.plain,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            scheme=place.scheme,
            who=place.who,
        )
    check_reduction(reduction, place.who)
    counts = counting_rows(
        logits, target, classes=place.size, ignore_index=ignore_index, who=place.who
    )
    place.axis.note(target, who=place.who, what="labels", whole=True)
    log_p = _log_softmax(gather(logits, 1, place), place)
    of_class = log_p.new_ones(place.size) if weight is None else widen(weight)
    classes = target.clamp(min=0, max=place.size - 1)
    losses = -log_p.gather(1, classes.unsqueeze(1)).squeeze(1) * of_class[classes]
    if label_smoothing:
        uniform = sum_rows((log_p * of_class).t()) * (-label_smoothing / place.size)
        losses = losses * (1 - label_smoothing) + uniform
    total = None
    if weight is not None and reduction == "mean":
        total = sum_all(of_class[classes].masked_fill(~counts, 0))
    return reduce_rows(losses, counts, reduction, dtype=logits.dtype, denominator=total)
