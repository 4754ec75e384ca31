"""Class indices and what is made of one loss per row: what every cross-entropy shares.

Plain tensors that all ranks have alike: no axis, and an error here is one on all ranks.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from shardproof import batch_leaves, operands, operators
from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.sums import sum_all
from shardproof.tree import sum_leaves

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: str, who: str) -> None:
    """Raise unless `reduction` is known.

    Raises:
        UsageError: it is not.
    """
    if reduction not in get_args(Reduction):
        raise UsageError(
            f"{who}: reduction={reduction!r} is unknown. "
            f"Use one of: {', '.join(get_args(Reduction))}."
        )


def check_kind(logits: Tensor, target: Tensor, who: str) -> None:
    """Raise unless both are plain memory, and the logits of a dtype that is computed with.

    Args:
        logits: (rows, *), any placement.
        target: (rows,), Replicate.
        who: for messages.
    Raises:
        UsageError: they are not.
    Comm:
        forward none; backward none.
    """
    operands.check_float(logits, who, "logits")
    if operands.is_odd(target):
        operands.check(who, target=target)


def counting_rows(
    logits: Tensor, target: Tensor, *, classes: int, ignore_index: int, who: str
) -> Tensor:
    """Which rows count: those whose target is not `ignore_index`.

    Args:
        logits: (rows, *), any placement.
        target: (rows,), Replicate. Class indices, int64.
        classes: how many there are, on all ranks together.
        ignore_index: rows with this target count for nothing.
        who: for messages.
    Returns:
        (rows,), Replicate; bool.
    Raises:
        ShapeError: the shapes do not fit each other.
        UsageError: a target is no class index.
    """
    check_kind(logits, target, who)
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ShapeError(
            f"{who}: logits (rows, classes) and target (rows,) wanted, got shapes "
            f"{tuple(logits.shape)} and {tuple(target.shape)}. Flatten leading dims first."
        )
    if target.dtype != torch.int64:
        raise UsageError(f"{who}: target must hold class indices as int64, got {target.dtype}.")
    if operators.is_recorded(target):
        counts: Tensor = _counts(target, classes, ignore_index, who)
        return counts
    return _checked_counts(target, classes, ignore_index, who)


def _checked_counts(target: Tensor, classes: int, ignore_index: int, who: str) -> Tensor:
    counts = target != ignore_index
    is_wrong = counts & ((target < 0) | (target >= classes))
    if not target.is_meta and bool(is_wrong.any()):
        row = int(is_wrong.nonzero()[0])
        raise UsageError(
            f"{who}: target {int(target[row])} is no class of {classes}, in row {row}. Use "
            f"0 to {classes - 1}, or ignore_index={ignore_index} for rows that do not count."
        )
    return counts


_counts = operators.define(
    "counting_rows(Tensor target, int classes, int ignore_index, str who) -> Tensor",
    lambda target, *_: torch.empty_like(target, dtype=torch.bool),
)(_checked_counts)


def reduce_rows(
    losses: Tensor,
    counts: Tensor,
    reduction: Reduction,
    *,
    dtype: torch.dtype,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """One loss per row to what the caller asked for.

    Args:
        losses: (rows,), Replicate.
        counts: (rows,), Replicate. Which of them count.
        reduction: "mean" over the rows that count, "sum", or "none".
        dtype: of the result: rounded once, at the end.
        denominator: what a mean divides by, if not by the number of rows that count.
    Returns:
        (), or (rows,) for "none"; Replicate.
    """
    losses = losses.masked_fill(~counts, 0)
    if reduction == "none":
        return losses.to(dtype)
    total = _total(losses)
    if reduction == "mean":
        total = total / (counts.sum() if denominator is None else denominator)
    return total.to(dtype)


def _total(losses: Tensor) -> Tensor:
    """The sum over the rows of a batch, by batch leaves if the pass has several."""
    batch = batch_leaves.several()
    if batch is None:
        return sum_all(losses)
    at = batch.row_slices(losses.shape[0], "a loss")
    return sum_leaves(sum_all(losses[each]) for each in at)
