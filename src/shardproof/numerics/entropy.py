"""Cross-entropy of whole scores: log_softmax, then sums by `reducing.total`.

Plain tensors; no ranks.
"""

from typing import Any

from torch import Tensor
from torch.nn import _reduction

from shardproof.numerics.contracting import mul
from shardproof.numerics.reducing import total
from shardproof.numerics.rowwise import log_softmax


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
    """`F.cross_entropy`.

    Args:
        input: (N, C, *) or (C,). Scores, Replicate along C.
        target: (N, *) class indices, or probabilities of the shape of `input`.
        weight: (C,), of each class.
        size_average: as torch has it.
        ignore_index: targets that count for nothing.
        reduce: as torch has it.
        reduction: "mean", "sum" or "none".
        label_smoothing: this part of each target is spread over all classes.
    Returns:
        (), or (N, *) for "none".
    """
    classes = min(1, input.dim() - 1)
    reduction = _reduced(size_average, reduce, reduction)
    logs = log_softmax(input, classes)
    count = input.shape[classes]
    if target.is_floating_point():
        shares = target * (1 - label_smoothing) + label_smoothing / count
        losses = -total(_weighted(logs * shares, weight, classes), classes)
        return _finished(losses, losses.numel(), reduction)
    losses, shares, kept = _picked(logs, target, weight, ignore_index, classes)
    if label_smoothing:
        smooth = -total(_weighted(logs, weight, classes), classes)
        smooth = smooth.where(kept, smooth.new_zeros(()))
        losses = losses * (1 - label_smoothing) + smooth * (label_smoothing / count)
    return _finished(losses, total(shares), reduction)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`F.nll_loss`: of log-probabilities; arguments as `cross_entropy` has them.

    Args:
        input: (N, C, *) or (C,).
        target: (N, *) class indices.
        weight: (C,).
        size_average: as torch has it.
        ignore_index: targets that count for nothing.
        reduce: as torch has it.
        reduction: "mean", "sum" or "none".
    Returns:
        (), or (N, *) for "none".
    """
    classes = min(1, input.dim() - 1)
    losses, shares, _ = _picked(input, target, weight, ignore_index, classes)
    return _finished(losses, total(shares), _reduced(size_average, reduce, reduction))


def _picked(
    logs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each target its loss, how much it counts, and whether it counts."""
    kept = target != ignore_index
    index = target.where(kept, 0)
    picked = -logs.gather(classes, index.unsqueeze(classes)).squeeze(classes)
    shares = kept.to(logs.dtype) if weight is None else weight[index] * kept
    return picked.where(kept, picked.new_zeros(())) * shares, shares, kept


def _weighted(logs: Tensor, weight: Tensor | None, classes: int) -> Tensor:
    if weight is None:
        return logs
    return mul(logs, weight.reshape(-1, *[1] * (logs.dim() - classes - 1)))


def _finished(losses: Tensor, count: Any, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return total(losses) / count if reduction == "mean" else total(losses)


def _reduced(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce)
