"""Known mistakes in losses."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from shardproof.checker import mistake_kinds as kinds
from shardproof.checker.evidence import (
    KnownMistake,
    are_alike,
    factors_of,
    misfit,
    relative,
    times_words,
)
from shardproof.checker.judging import Judge
from shardproof.checker.locating import Fault
from shardproof.checker.program import Program


def loss_scaled(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A loss that is divided or multiplied by the number of ranks."""
    judgement = fault.of_module
    for factor, _ in factors_of(judge.degree):
        left = misfit(judgement.locals, factor * judgement.whole, judge.bound(judgement.whole))
        if left is not None:
            kind = kinds.LOSS_AVERAGED if factor < 1 else kinds.TWICE
            return KnownMistake(
                kind,
                f"the loss is {times_words(factor)} the right one",
                relative(left, judgement.whole),
            )
    more = judgement.whole + math.log(judge.degree)
    left = misfit(judgement.locals, more, judge.bound(more))
    if left is not None:
        return KnownMistake(
            kinds.TWICE,
            f"the loss is the right one and the logarithm of {judge.degree} more, as if each "
            f"exponential of a softmax was counted {judge.degree} times",
            relative(left, more),
        )
    return None


def loss_of_slices(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Outputs that are cut, and a loss that is neither their sum nor right."""
    judgement = fault.of_module
    outputs = [
        each
        for each in map(judge.value, judge.places(fault.step))
        if each.name.startswith("output of the model")
    ]
    if not outputs:
        return None
    placement = outputs[-1].placement
    if placement.dim is None or not outputs[-1].is_right:
        return None
    if placement.dim == outputs[-1].whole.ndim - 1:
        return KnownMistake(
            kinds.MISSING_SUM,
            "each rank holds a slice of the output's last dim, and the loss does not join them",
        )
    is_alike = are_alike(judgement.locals, judge)
    kind = kinds.LOSS_AVERAGED if is_alike else kinds.MISSING_SUM
    return KnownMistake(
        kind, f"the output is {placement}, and each rank's loss is of its own slice"
    )


def labels_shifted(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """The loss of other labels: the plain module's outputs give it with shifted labels."""
    output = _output(judge)
    if output is None:
        return None
    for words, other, batch in _shifted(program, output):
        loss = _loss_or_none(program, other, batch)
        if loss is None:
            continue
        left = misfit(fault.judgement.locals, loss, judge.bound(loss))
        if left is not None:
            return KnownMistake(kinds.LABELS, f"the loss is that of {words}", relative(left, loss))
    return None


def padding_counted(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Outputs or parameters with more columns than the plain module's."""
    for at in judge.places(fault.step):
        judgement = judge.value(at)
        dim, indices = judgement.placement.dim, judgement.placement.indices
        if dim is None or indices is None or not judgement.is_right:
            continue
        size = judgement.whole.shape[dim]
        held = sum(len(each) for each in indices)
        highest = max((max(each, default=0) for each in indices), default=0)
        if highest >= size:
            return KnownMistake(
                kinds.PADDING,
                f"the {judgement.name} has {held} columns on all ranks together, and the plain one "
                f"has {size}",
            )
    sizes = _sizes_of_output(judge)
    if sizes is not None and sizes[0] > sizes[1]:
        return KnownMistake(
            kinds.PADDING,
            f"the output has {sizes[0]} columns, and the plain one has {sizes[1]}",
        )
    for name, whole in judge.runs.reference.parameters.items():
        rows = [len(each.parameters[name].value) for each in judge.runs.ranks
                if name in each.parameters and each.parameters[name].value.ndim]  # fmt: skip
        if len(rows) < judge.degree or whole.value.ndim != 2:
            continue
        num_rows = len(whole.value)
        if sum(rows) > num_rows and any(each != num_rows for each in rows):
            return KnownMistake(
                kinds.PADDING,
                f"{name} has {sum(rows)} rows on all ranks together, and the plain one has "
                f"{num_rows}",
            )
    return None


def _output(judge: Judge) -> Tensor | None:
    """The first tensor of the plain module's output."""
    for at, value in judge.runs.reference.values.items():
        if at.step == 0 and not at.path and at.side == "output":
            return value
    return None


def _sizes_of_output(judge: Judge) -> tuple[int, int] | None:
    for at, whole in judge.runs.reference.values.items():
        if at.step == 0 and not at.path and at.side == "output" and whole.ndim:
            locals_ = [each.values.get(at) for each in judge.runs.ranks]
            held = [each.shape[-1] for each in locals_ if each is not None and each.ndim]
            if len(held) == judge.degree:
                is_cut = held[0] < whole.shape[-1]
                return (sum(held) if is_cut else held[0]), whole.shape[-1]
    return None


def _shifted(program: Program, output: Tensor) -> Iterator[tuple[str, Tensor, Any]]:
    """Outputs and batches of which one is shifted against the other, and words for that."""
    batch = program.make_batch(output.dtype)
    tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    for tensor in tensors:
        for dim, shift in itertools.product(range(tensor.ndim), (1, -1)):
            moved = pytree.tree_map(
                lambda x, t=tensor, s=shift, d=dim: x.roll(s, d) if x is t else x, batch
            )
            yield f"labels shifted by {shift} along dim {dim}", output, moved
    for dim, shift in itertools.product(range(output.ndim - 1), (1, -1)):
        words = f"outputs shifted by {shift} against the labels"
        yield words, output.roll(shift, dim), batch
        yield words, _trimmed(output, shift, dim), batch


def _loss_or_none(program: Program, output: Tensor, batch: Any) -> Tensor | None:
    """The loss of an output; None where the loss cannot take it."""
    try:
        with torch.no_grad():
            return program.loss_of(output, batch, None).reshape(())
    except Exception:  # the user's loss may want more than a tensor, or other shapes
        return None


def _trimmed(output: Tensor, shift: int, dim: int) -> Tensor:
    size = output.shape[dim]
    return output.narrow(dim, max(shift, 0), size - abs(shift)) if size > 1 else output
