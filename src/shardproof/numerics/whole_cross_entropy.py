"""Cross-entropy of whole logits: log_softmax, then sums by `dim_sums.total`.

bf16 and fp16 are computed in fp32 and rounded once, at the end. Plain tensors; no ranks.
"""

from typing import Any

from torch import Tensor
from torch.nn import _reduction

from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.dim_sums import total
from shardproof.numerics.precision import widen
from shardproof.numerics.softmax_and_norms import log_softmax
from shardproof.numerics.torch_products import mul


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits, as `F.cross_entropy` computes it.

    Args:
        input: (N, C, *) or (C,), Replicate along C.
        target: (N, *) class indices, or probabilities of the shape of `input`; placed as `input`.
        weight: (C,), Replicate. Of each class.
        size_average: as torch has it.
        ignore_index: targets that count for nothing.
        reduce: as torch has it.
        reduction: "mean", "sum" or "none".
        label_smoothing: this part of each target is spread over all classes.
    Returns:
        (), or (N, *) for "none".
    Raises:
        ShapeError: the target does not fit the input.
        UsageError: the reduction is unknown, or smoothing is no number from 0 to 1.
    """
    classes = min(1, input.dim() - 1)
    reduction = _reduced(size_average, reduce, reduction)
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"cross_entropy: label_smoothing={label_smoothing}. Give 0.0 to 1.0.")
    logs = log_softmax(widen(input), classes)
    count = input.shape[classes]
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ShapeError(
                f"cross_entropy: probabilities of shape {tuple(target.shape)} for an input of "
                f"shape {tuple(input.shape)}. Give both the same shape."
            )
        shares = target * (1 - label_smoothing) + label_smoothing / count
        losses = -total(_weighted(logs * shares, weight, classes), classes)
        return _finished(losses, losses.numel(), reduction).to(input.dtype)
    losses, shares, keep_mask = _picked(logs, target, weight, ignore_index, classes)
    if label_smoothing:
        smooth = -total(_weighted(logs, weight, classes), classes)
        smooth = smooth.where(keep_mask, smooth.new_zeros(()))
        losses = losses * (1 - label_smoothing) + smooth * (label_smoothing / count)
    return _finished(losses, total(shares), reduction).to(input.dtype)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of log-probabilities, as `F.nll_loss` computes it.

    Args:
        input: (N, C, *) or (C,), Replicate along C.
        target: (N, *) class indices, placed as `input`.
        weight: (C,), Replicate. Of each class.
        size_average: as torch has it.
        ignore_index: targets that count for nothing.
        reduce: as torch has it.
        reduction: "mean", "sum" or "none".
    Returns:
        (), or (N, *) for "none".
    Raises:
        ShapeError: the target does not fit the input.
        UsageError: the reduction is unknown.
    """
    classes = min(1, input.dim() - 1)
    reduction = _reduced(size_average, reduce, reduction)
    losses, shares, _ = _picked(widen(input), target, weight, ignore_index, classes)
    return _finished(losses, total(shares), reduction).to(input.dtype)


def _picked(
    logs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each target its loss, its weight, and whether it is not ignored."""
    target_shape = (*logs.shape[:classes], *logs.shape[classes + 1 :])
    if tuple(target.shape) != target_shape:
        raise ShapeError(
            f"the targets have shape {tuple(target.shape)}, and an input of shape "
            f"{tuple(logs.shape)} needs {target_shape}. Give one class index for each prediction."
        )
    keep_mask = target != ignore_index
    index = target.where(keep_mask, 0)
    picked = -logs.gather(classes, index.unsqueeze(classes)).squeeze(classes)
    shares = keep_mask.to(logs.dtype) if weight is None else weight[index] * keep_mask
    return picked.where(keep_mask, picked.new_zeros(())) * shares, shares, keep_mask


def _weighted(logs: Tensor, weight: Tensor | None, classes: int) -> Tensor:
    if weight is None:
        return logs
    return mul(logs, weight.reshape(-1, *[1] * (logs.dim() - classes - 1)))


def _finished(losses: Tensor, count: Any, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return total(losses) / count if reduction == "mean" else total(losses)


def _reduced(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f'reduction={reduction!r}. Give "mean", "sum" or "none".')
    return reduction
