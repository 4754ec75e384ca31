"""Losses with the same bits at every degree.

A mean over a cut dim is summed leaf by leaf and then by the canonical tree, at degree 1 too. All
other sums are halving folds (`numerics.sums`). bf16 and fp16 are computed in fp32 and rounded once,
at the end.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof import observing, operands
from shardproof.axis import Axis
from shardproof.comm.differentiable import all_reduce
from shardproof.errors import ShapeError, UsageError
from shardproof.leaves import Cut
from shardproof.numerics.precision import widen
from shardproof.numerics.sums import sum_rows, sum_squares
from shardproof.observing import REPLICATE, Operand, Placement, StepEvent, shard
from shardproof.ops.class_targets import (
    Reduction,
    check_kind,
    check_reduction,
    counting_rows,
    reduce_rows,
)


def mse_loss(
    y: Tensor,
    target: Tensor,
    *,
    axis: Axis | None = None,
    cut: Cut | None = None,
    who: str = "mse_loss",
) -> Tensor:
    """Mean of squared differences over the elements that all ranks hold together.

    Args:
        y: (*), Replicate; or (*, owned), Shard(-1), if `axis` and `cut` are given.
        target: shape and placement of `y`.
        axis: the ranks that share the last dim.
        cut: how they share it.
        who: a name for messages.
    Returns:
        (), Replicate; its gradient is expected to be Replicate.
    Raises:
        ShapeError: the shapes differ, or the last dim is not what this rank owns.
        UsageError: only one of `axis` and `cut` is given.
    Comm:
        forward none, or one all_reduce of () if `axis` is given; backward none.
    """
    if operands.is_odd(y) or operands.is_odd(target) or operands.is_traced():
        operands.check(who, y=y, target=target)
    operands.check_floating(who, y=y, target=target)
    if y.shape != target.shape:
        raise ShapeError(
            f"{who}: y has shape {tuple(y.shape)} and target {tuple(target.shape)}. "
            "Nothing is broadcast: give both the same shape."
        )
    if axis is None and cut is None:
        total, count = _SquaredError.apply(y, target, None, REPLICATE)[0], y.numel()
        loss = (total / count).to(y.dtype)
        _tell("mean of the squares of y - target", who, y, target, REPLICATE, loss)
        return loss
    if axis is None or cut is None:
        present, missing = ("cut", "axis") if axis is None else ("axis", "cut")
        raise UsageError(
            f"{who}: {present} is given without {missing}. Give both for a sharded y, or neither."
        )
    place = shard(y.dim() - 1, _checked_owned(y, axis, cut, who), cut.size)
    slices = cut.leaf_slices(axis.rank)
    # A rank without leaves still takes part, and backward must pass through it as on all others.
    partials = _SquaredError.apply(y, target, slices or (slice(0, 0),), place)
    total = all_reduce(list(partials) if slices else [], axis, cut=cut, who=who, like=partials[0])
    loss = (total / (y.shape[:-1].numel() * cut.size)).to(y.dtype)
    _tell("mean of the squares of y - target", who, y, target, place, loss)
    return loss


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log-likelihood of the target classes under the softmax of the logits.

    Args:
        logits: (rows, classes), Replicate.
        target: (rows,), Replicate. Class indices, int64.
        ignore_index: rows with this target count for nothing.
        reduction: "mean" over the rows that count, "sum", or "none".
    Returns:
        (), or (rows,) for "none"; Replicate.
    Raises:
        ShapeError: the shapes do not fit each other.
        UsageError: the reduction is unknown, or a target is no class index.
    Comm:
        forward none; backward none.
    """
    who = "cross_entropy"
    check_reduction(reduction, who)
    check_kind(logits, target, who)
    classes = logits.shape[-1] if logits.dim() else 0
    counts = counting_rows(logits, target, classes=classes, ignore_index=ignore_index, who=who)
    losses, _ = _RowCrossEntropy.apply(logits, target.masked_fill(~counts, 0))
    loss = reduce_rows(losses, counts, reduction, dtype=logits.dtype)
    _tell("-log softmax(logits)[target]", who, logits, target, REPLICATE, loss)
    return loss


class _SquaredError(torch.autograd.Function):
    """Sum of squares per slice of the last dim (of all, if None); 2 (y - target) g backward."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        target: Tensor,
        slices: tuple[slice, ...] | None,
        placement: Placement,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(y, target)
        ctx.slices, ctx.placement = slices, placement
        if slices is None:
            return (sum_squares(_difference(y, target)),)
        return tuple(sum_squares(_difference(y[..., at], target[..., at])) for at in slices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        y, target = ctx.saved_tensors
        if ctx.slices is None:
            grad = _difference(y, target) * (2 * grads[0])
        else:
            parts = [
                _difference(y[..., at], target[..., at]) * (2 * g)
                for at, g in zip(ctx.slices, grads, strict=True)
            ]
            grad = torch.cat(parts, dim=-1)
        _tell_gradient("mse_loss", y, grad, ctx.placement)
        grad_target = (-grad).to(target.dtype) if ctx.needs_input_grad[1] else None
        return grad.to(y.dtype), grad_target, None, None


class _RowCrossEntropy(torch.autograd.Function):
    """Per row: log sum exp - logit of the target, and log sum exp; p - onehot backward.

    The second output is there for a second backward: what is saved of it remembers where it came
    from.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        wide = widen(logits)
        top = wide.amax(1)
        log_sum = sum_rows((wide - top[:, None]).exp_().t()).log_().add_(top)
        ctx.save_for_backward(logits, target, log_sum)
        return log_sum - wide.gather(1, target[:, None])[:, 0], log_sum

    @staticmethod
    def backward(
        ctx: Any, grad_losses: Tensor | None, grad_log_sum: Tensor | None
    ) -> tuple[Tensor | None, None]:
        logits, target, log_sum = ctx.saved_tensors
        p = torch.exp(widen(logits) - log_sum[:, None])
        grad = None
        if grad_losses is not None:
            minus_one = p.new_full((p.shape[0], 1), -1.0)
            grad = p.scatter_add(1, target[:, None], minus_one) * grad_losses[:, None]
        if grad_log_sum is not None:
            extra = p * grad_log_sum[:, None]
            grad = extra if grad is None else grad + extra
        if grad is None:
            return None, None
        grad = grad.to(logits.dtype)
        _tell_gradient("cross_entropy", logits, grad, REPLICATE)
        return grad, None


def _tell(
    what: str, who: str, y: Tensor, target: Tensor, placement: Placement, loss: Tensor
) -> None:
    if observing.is_on():
        inputs = [Operand("y", y, placement), Operand("target", target)]
        output = Operand("loss", loss, REPLICATE)
        observing.tell(StepEvent("loss", "forward", who, what, inputs, output))


def _tell_gradient(who: str, y: Tensor, grad: Tensor, place: Placement) -> None:
    if observing.is_on():
        inputs, output = [Operand("y", y, place)], Operand("grad_y", grad, place)
        what = "grad_y = the gradient of the loss"
        observing.tell(StepEvent("loss", "backward", who, what, inputs, output))


def _difference(y: Tensor, target: Tensor) -> Tensor:
    return widen(y) - widen(target)


def _checked_owned(y: Tensor, axis: Axis, cut: Cut, who: str) -> range:
    """What this rank owns of the last dim."""
    owned = cut.owned(axis.rank)
    if y.dim() == 0 or y.shape[-1] != len(owned):
        raise ShapeError(
            f"{who} on {axis}: y has shape {tuple(y.shape)}, but of a dim of {cut.size} in "
            f"{cut.num_leaves} leaves this rank owns {len(owned)}: shape (*, {len(owned)}) wanted."
        )
    return owned
