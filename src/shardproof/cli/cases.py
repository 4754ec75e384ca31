"""The cases that a command runs: those of --case, a user's model, or all that can run."""

import dataclasses
from collections.abc import Sequence

from shardproof import extras
from shardproof.errors import UsageError
from shardproof.hf.skeleton import require_transformers
from shardproof.prover import Case
from shardproof.prover import cases as case_registry
from shardproof.prover.cases.text_training import TextTraining
from shardproof.prover.cases.transformers_models import checkpoint_case
from shardproof.wording import short_text

Skipped = tuple[dict[str, str], ...]  # cases that lack their extra, as reports have them


def select_cases(
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
    cases, skipped = _named_cases(names) if names or model is None else ((), ())
    if model is not None:
        cases = (*cases, _model_case(model))
    if steps is None:
        return cases, skipped
    if not any(isinstance(case.work, TextTraining) for case in cases):
        trained = [
            case for case in case_registry.all_cases() if isinstance(case.work, TextTraining)
        ]
        raise UsageError(
            f"--steps {steps} is for cases that train on text, and there is none among "
            f"{case_names_of(cases)}. {add_one_of(trained)}"
        )
    return tuple(_with_steps(case, steps) for case in cases), skipped


def case_names_of(cases: Sequence[Case]) -> str:
    """The names of some cases, for a message."""
    return ", ".join(case.name for case in cases)


def add_one_of(cases: Sequence[Case]) -> str:
    """What to write on the command line to get one of some cases."""
    options = ", ".join(f"--case {case.name}" for case in cases)
    return f"Add --model DIR, or one of: {options}."


def _named_cases(names: Sequence[str]) -> tuple[tuple[Case, ...], Skipped]:
    if names:
        return tuple(find_installed(name) for name in dict.fromkeys(names)), ()
    cases = case_registry.all_cases()
    skipped = [case for case in cases if not case.is_installed]
    return (
        tuple(case for case in cases if case.is_installed),
        tuple({"name": case.name, "extra": case.extra} for case in skipped),
    )


def find_installed(name: str) -> Case:
    """The case of a name.

    Raises:
        UsageError: there is no such case, or its extra is not installed.
    """
    case = case_registry.find_case(name)
    if not case.is_installed:
        raise UsageError(f"--case {case.name} {extras.is_wanted(case.extra)}")
    return case


def _model_case(directory: str) -> Case:
    require_transformers(f"--model {short_text(directory)}")
    try:
        return checkpoint_case(directory)
    except UsageError as error:
        raise UsageError(f"--model: {error}") from None


def _with_steps(case: Case, steps: int) -> Case:
    if not isinstance(case.work, TextTraining):
        return case
    return dataclasses.replace(case, work=dataclasses.replace(case.work, steps=steps))
