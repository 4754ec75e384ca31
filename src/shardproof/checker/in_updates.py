"""Known mistakes in updates: clipping, decay, and weights that were not updated."""

import math
from collections.abc import Sequence

from torch import Tensor

from shardproof.checker import mistake_kinds as kinds
from shardproof.checker.evidence import (
    KnownMistake,
    factor_between,
    factors_of,
    listed,
    ranks_words,
    times_words,
)
from shardproof.checker.in_gradients import all_gradients, factor_of
from shardproof.checker.judging import Judge, ParameterJudgement
from shardproof.checker.locating import Fault
from shardproof.checker.placement import apart
from shardproof.checker.program import Program

_NEARLY = 0.9  # of all gradients: some are zero but for rounding


def clipped_otherwise(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Gradients that were right after backward, and are scaled before the update."""
    judgement = fault.of_parameter
    if not judgement.name.startswith("gradient at the update"):
        return None
    if not judgement.locals:
        name = judgement.layout.name
        without = [
            rank
            for rank, each in enumerate(judge.runs.ranks)
            if each.used_gradients.get((fault.step, name)) is None
        ]
        return KnownMistake(
            kinds.STALE, f"the update has no gradient of {name} on {ranks_words(without)}"
        )
    every = all_gradients(fault, judge, used=True)
    by_rank = [_shared_factor(every, rank) for rank in range(judge.degree)]
    found = [f"{each:.7g}" for each in by_rank if each is not None]
    if len(found) == judge.degree:
        return KnownMistake(
            kinds.NORM,
            f"before the update all gradients on ranks 0, 1, ... are {listed(found)} times the "
            "right ones, and after backward they were right",
            0.0,
        )
    own = factor_of(judgement)
    for factor, kind in factors_of(judge.degree):
        if own is not None and math.isclose(own, factor, rel_tol=1e-6):
            return KnownMistake(
                kind,
                f"the {judgement.name} is {times_words(factor)} the right one, and after backward "
                "it was right",
                0.0,
            )
    return None


def _shared_factor(every: Sequence[ParameterJudgement], rank: int) -> float | None:
    """The factor by which a rank's gradients are scaled; None if it is not one for nearly all."""
    factors = [factor_of(each, rank) for each in every]
    known = [each for each in factors if each is not None]
    if not known or len(known) < _NEARLY * len(factors):
        return None
    is_one = all(math.isclose(each, known[0], rel_tol=1e-6) for each in known)
    return known[0] if is_one else None


def not_updated(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A weight that some ranks did not update."""
    judgement = fault.of_parameter
    if not judgement.name.startswith("updated "):
        return None
    name = judgement.layout.name
    stale = []
    for rank, local in enumerate(judgement.locals):
        before = _weight_before(judge, rank, name, fault.step)
        if before is not None and apart(local, before) == 0.0:
            stale.append(rank)
    if stale and apart(judgement.whole, _whole_before(judge, judgement.layout.whole, fault.step)):
        return KnownMistake(kinds.STALE, f"{name} did not change on {ranks_words(stale)}")
    right = [
        rank
        for rank, (local, each) in enumerate(zip(judgement.locals, judgement.expected, strict=True))
        if apart(local, each) <= judge.bound(judgement.whole)
    ]
    if right and judgement.layout.is_whole:
        return KnownMistake(
            kinds.STALE, f"{name} is right on {ranks_words(right)} only after the update"
        )
    return None


def decayed_twice(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A weight that is smaller than it should be, in proportion to itself."""
    judgement = fault.of_parameter
    if not judgement.name.startswith("updated "):
        return None
    ratios = []
    name = judgement.layout.name
    for rank, (local, each) in enumerate(zip(judgement.locals, judgement.expected, strict=True)):
        before = _weight_before(judge, rank, name, fault.step)
        if before is None:
            return None
        ratio = factor_between(local - each, before, tolerance=1e-3)
        if ratio is None:  # the decay came after the update
            ratio = factor_between(local - each, each, tolerance=1e-3)
        if ratio is None:
            return None
        ratios.append(ratio)
    if all(each < 0 for each in ratios):
        return KnownMistake(
            kinds.DECAY,
            f"the update of {name} took {-ratios[0]:.4g} times the weight too much",
        )
    return None


def stale_in_next_forward(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Parameters that are right after the update, and an output that is not."""
    if not all(each.is_found for each in judge.layouts.values()):
        return None  # a parameter that was not compared may be wrong
    return KnownMistake(
        kinds.STALE,
        f"the parameters are right after the update, and the {fault.judgement.name} of the next "
        "forward is not",
    )


def _weight_before(judge: Judge, rank: int, name: str, step: int) -> Tensor | None:
    recording = judge.runs.ranks[rank]
    if step:
        return recording.weights.get((step - 1, name))
    return recording.parameters[name].value


def _whole_before(judge: Judge, name: str, step: int) -> Tensor:
    recording = judge.runs.reference
    return recording.weights[step - 1, name] if step else recording.parameters[name].value
