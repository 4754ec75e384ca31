"""Known mistakes in the gradients of parameters."""

import itertools
import math
from dataclasses import replace

from torch import Tensor

from shardproof.checker import mistake_kinds as kinds
from shardproof.checker.evidence import (
    KnownMistake,
    are_alike,
    factor_between,
    factors_of,
    is_key_value,
    listed,
    owner_of,
    ranks_words,
    relative,
    times_words,
)
from shardproof.checker.in_outputs import open_part
from shardproof.checker.judging import Judge, ParameterJudgement
from shardproof.checker.locating import Fault
from shardproof.checker.placement import apart, largest
from shardproof.checker.program import Program
from shardproof.checker.step_recording import TensorPlace


def no_gradient(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A parameter without a gradient, or with one of zeros."""
    judgement = fault.of_parameter
    if not judgement.locals:
        return KnownMistake(kinds.NO_GRADIENT, f"{judgement.layout.name} has no gradient")
    zero = [rank for rank, each in enumerate(judgement.locals) if not largest(each)]
    if len(zero) == len(judgement.locals) and largest(judgement.whole):
        return KnownMistake(
            kinds.NO_GRADIENT, f"the {judgement.name} is zero on {ranks_words(zero)}"
        )
    return None


def open_part_of_gradient(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """The gradient of an output is a part, and so are those of the parameters behind it."""
    source, layout = fault.source, fault.of_parameter.layout
    if source is None or owner_of(layout) != source.module:
        return open_part(fault, judge, program)
    is_alone = all(judge.gradient(at).is_right for at in judge.gradient_places(fault.step))
    if is_alone or is_key_value(layout):  # what goes on from here is summed
        return parts_of_gradient(fault, judge, program)
    return open_part(fault, judge, program)


def scaled_everywhere(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """All gradients are scaled alike, so the loss was."""
    ratios = [factor_of(each) for each in all_gradients(fault, judge)]
    known = [each for each in ratios if each is not None]
    if not known or len(known) < 0.9 * len(ratios):
        return None
    for factor, _ in factors_of(judge.degree):
        if all(math.isclose(each, factor, rel_tol=1e-6) for each in known):
            kind = kinds.LOSS_AVERAGED if factor < 1 else kinds.TWICE
            return KnownMistake(
                kind,
                f"the gradients of all {len(ratios)} parameters are {times_words(factor)} the "
                "right ones",
                0.0,
            )
    return None


def parts_of_gradient(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A parameter that several ranks hold, and whose gradient is a part on each, or scaled."""
    judgement = fault.of_parameter
    layout = judgement.layout
    if not layout.is_found:
        return None
    bound = judge.bound(judgement.whole)
    for factor, kind in factors_of(judge.degree):
        pairs = zip(judgement.locals, judgement.expected, strict=True)
        if all(apart(local, factor * each) <= bound for local, each in pairs):
            return KnownMistake(
                kind, f"the {judgement.name} is {times_words(factor)} the right one", 0.0
            )
    left = apart(judgement.total, judgement.whole)
    held = "hold" if layout.is_whole else "share"
    if left <= bound and (layout.is_whole or layout.overlaps):
        kind = kinds.KEY_VALUE if is_key_value(layout) else kinds.REPLICATED
        return KnownMistake(
            kind,
            f"the ranks {held} {layout.name}, and the sum of their gradients is right",
            relative(left, judgement.whole),
        )
    if layout.is_whole or layout.overlaps:
        mean = judgement.total / judge.degree
        if layout.is_whole and apart(mean, judgement.whole) <= bound:
            return KnownMistake(
                kinds.REPLICATED,
                f"all ranks hold {layout.name}, and the mean of their gradients is right",
                0.0,
            )
        for factor, kind in factors_of(judge.degree):
            if apart(judgement.total, factor * judgement.whole) <= bound:
                return KnownMistake(
                    kind,
                    f"the {judgement.name}, summed, is {times_words(factor)} the right one",
                    0.0,
                )
        tied = _tied(judgement, judge)
        if tied is not None:
            return tied
        if not are_alike(judgement.locals, judge):
            kind = kinds.KEY_VALUE if is_key_value(layout) else kinds.REPLICATED
            return KnownMistake(
                kind,
                f"the ranks {held} {layout.name}, and their gradients differ",
                relative(left, judgement.whole),
            )
    return _tied(judgement, judge)


def _tied(judgement: ParameterJudgement, judge: Judge) -> KnownMistake | None:
    """A parameter that the reference has under several names, and the program several times."""
    for other in judge.layouts.values():
        if other.name == judgement.layout.name or not other.is_found:
            continue
        both = judge.runs.reference.parameters
        one, two = both[judgement.layout.whole].value, both[other.whole].value
        is_constant = not one.numel() or bool((one == one.flatten()[0]).all())
        if one.shape == two.shape and apart(one, two) == 0.0 and not is_constant:
            return KnownMistake(
                kinds.STALE,
                f"the plain module has one parameter for {judgement.layout.name} and "
                f"{other.name}, and the program has two",
            )
    return None


def parts_of_readers(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Some of the layers that read a tensor do not sum the gradient of their input."""
    judgement, at = fault.of_module, fault.place
    bound = judge.bound(judgement.whole)
    if at is None or at.side != "output":
        return None
    value = judge.value(at)
    readers = [
        (each.path, parts)
        for each in judge.places(fault.step)
        if each.side == "input" and each.path != at.path
        and (parts := _gradient_parts(each, judge, value.whole)) is not None
    ]  # fmt: skip
    for count in sorted({1, 2, len(readers)} & set(range(1, len(readers) + 1))):
        for chosen in itertools.combinations(readers, count):
            wrong = []
            for rank in range(judge.degree):
                missing = [sum(parts) - parts[rank] for _, parts in chosen]
                wrong.append(judgement.whole - sum(missing))
            left = max(map(apart, judgement.locals, wrong))
            names = listed([path for path, _ in chosen])
            without = judgement.whole - sum(sum(parts) for _, parts in chosen)
            if max(apart(each, without) for each in judgement.locals) <= bound:
                return KnownMistake(
                    kinds.NO_GRADIENT,
                    f"the {judgement.name} has nothing of what comes from {names}",
                )
            if left <= bound:
                return KnownMistake(
                    kinds.MISSING_SUM,
                    f"the {judgement.name} has only this rank's part of what comes from {names}",
                    relative(left, judgement.whole),
                )
    return None


def _gradient_parts(at: TensorPlace, judge: Judge, read: Tensor) -> list[Tensor] | None:
    """What each rank's part of a linear layer adds to the gradient of what it reads."""
    whole = judge.runs.reference.values[at]
    output = replace(at, side="output")
    weight = f"{at.path}.weight"
    if whole.shape != read.shape or apart(whole, read) > judge.bound(read):
        return None
    parts = []
    for each in judge.runs.ranks:
        gradient = each.gradients.get(output)
        if gradient is None or weight not in each.parameters:
            return None
        held = each.parameters[weight].value
        if held.ndim != 2 or gradient.shape[-1] != held.shape[0]:
            return None
        part = gradient @ held
        if part.shape != read.shape:
            return None
        parts.append(part)
    return parts


def factor_of(judgement: ParameterJudgement, rank: int = 0) -> float | None:
    """The factor between a rank's gradient and the right one; None if there is none."""
    if not judgement.locals or not judgement.layout.is_found:
        return None
    return factor_between(judgement.locals[rank], judgement.expected[rank])


def all_gradients(fault: Fault, judge: Judge, *, used: bool = False) -> list[ParameterJudgement]:
    """The gradients of all parameters that are not zero."""
    found = []
    for layout in judge.layouts.values():
        judgement = judge.parameter(
            layout,
            lambda each, name: (each.used_gradients if used else each.parameter_gradients).get(
                (fault.step, name)
            ),
            "",
        )
        if judgement is not None and largest(judgement.whole) > judge.bound(judgement.whole):
            found.append(judgement)
    return found
