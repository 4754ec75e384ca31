"""Which cases `shardproof prove` is to run: those named, a user's model, or all that can run."""

import dataclasses
from collections.abc import Sequence

from shardproof import extras
from shardproof.errors import UsageError
from shardproof.hf.skeleton import require_transformers
from shardproof.prover import Case
from shardproof.prover import cases as known
from shardproof.prover.cases.text_training import TextTraining as Lesson
from shardproof.prover.cases.transformers_models import checkpoint_case
from shardproof.wording import written

Skipped = tuple[dict[str, str], ...]


def select(
    names: Sequence[str], model: str | None, steps: int | None
) -> tuple[tuple[Case, ...], Skipped]:
    """The cases to run, and those that are left out because their extra is not installed.

    Args:
        names: of cases; none means all, unless there is a model.
        model: a checkpoint directory, as `--model` has it.
        steps: for the cases that train on text; None leaves each its own.

    Raises:
        UsageError: no such case, an extra that is not installed, a directory that holds no model,
            or steps for cases that have none to set.
    """
    cases, skipped = _named(names) if names or model is None else ((), ())
    if model is not None:
        cases = (*cases, _model(model))
    if steps is None:
        return cases, skipped
    if not any(isinstance(case.work, Lesson) for case in cases):
        trained = [case.name for case in known.all_cases() if isinstance(case.work, Lesson)]
        raise UsageError(
            f"--steps {steps} is for cases that train on text, and there is none among "
            f"{', '.join(case.name for case in cases)}. Add --model DIR, or one of: "
            f"{', '.join(f'--case {name}' for name in trained)}."
        )
    return tuple(_with_steps(case, steps) for case in cases), skipped


def _named(names: Sequence[str]) -> tuple[tuple[Case, ...], Skipped]:
    if not names:
        cases = known.all_cases()
        skipped = [case for case in cases if not case.is_installed]
        return (
            tuple(case for case in cases if case.is_installed),
            tuple({"name": case.name, "extra": case.extra} for case in skipped),
        )
    asked = [known.find_case(name) for name in dict.fromkeys(names)]
    for case in asked:
        if not case.is_installed:
            raise UsageError(f"--case {case.name} {extras.is_wanted(case.extra)}")
    return tuple(asked), ()


def _model(given: str) -> Case:
    require_transformers(f"--model {written(given)}")
    try:
        return checkpoint_case(given)
    except UsageError as error:
        raise UsageError(f"--model: {error}") from None


def _with_steps(case: Case, steps: int) -> Case:
    if not isinstance(case.work, Lesson):
        return case
    return dataclasses.replace(case, work=dataclasses.replace(case.work, steps=steps))
