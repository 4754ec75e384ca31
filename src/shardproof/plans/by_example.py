"""A plan for a model of transformers whose own plan does not serve: watched with an example."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from shardproof.errors import PlanError
from shardproof.hf.detection import is_transformers
from shardproof.hf.example import BATCH, LENGTH, examples
from shardproof.layers.base import ShardedModule
from shardproof.plans.watched import plan_by_watching
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.scheme import Scheme
from shardproof.watching import Watched, watch
from shardproof.wording import written

_LONGEST_REASON = 300
_END = re.compile(r"\.\s")  # of a sentence


def has_example(model: nn.Module) -> bool:
    """Whether a forward of the model can be watched without inputs of a user."""
    return is_transformers(model) and not any(
        isinstance(module, ShardedModule) for module in model.modules()
    )


def plan_by_example(
    model: nn.Module,
    *,
    degree: int,
    scheme: Scheme,
    why: str = "",
    batch: int = BATCH,
    length: int = LENGTH,
) -> WatchedPlan:
    """Watch one forward with inputs that the model's config gives.

    Args:
        model: of transformers; on the meta device, if you like.
        degree: how many ranks.
        scheme: leaves, numerics, seed.
        why: the tp_plan that the model carries is not taken.
        batch: rows of the inputs.
        length: tokens of a row.

    Raises:
        PlanError: no example that the config gives is one with which the forward runs, or a rank
            cannot do a step.
    """
    inputs, watched = _first_that_runs(model, examples(model, batch=batch, length=length), why)
    plan = plan_by_watching(model, inputs, degree=degree, scheme=scheme, watched=watched)
    reason = f"{_first_sentence(why)}. So one" if why else "One"
    note = f"{reason} forward was watched, with inputs that the config gives: {_shapes(inputs)}"
    return replace(plan, notes=(*plan.notes, note))


def _first_sentence(why: str) -> str:
    """Of an error that may list several problems, each in a line: the first, and how many more."""
    start, *problems = why.split("\n- ")
    first = _END.split(problems[0] if problems else start)[0].rstrip(".")
    more = f" ({len(problems) - 1} more like this)" if problems[1:] else ""
    return written(f"{start.strip()} {first}{more}" if problems else first, most=_LONGEST_REASON)


def watch_example(model: nn.Module) -> Watched:
    """One forward of a model of transformers, with inputs that its config gives.

    Raises:
        PlanError: no example that the config gives is one with which the forward runs.
    """
    return _first_that_runs(model, examples(model), "")[1]


def _first_that_runs(
    model: nn.Module, examples: Iterable[dict[str, Any]], why: str
) -> tuple[dict[str, Any], Watched]:
    """The first example with which the forward can be watched."""
    first: PlanError | None = None
    tried = []
    for inputs in examples:
        try:
            return inputs, watch(model, (), inputs)
        except PlanError as error:
            first = first or error
            tried.append(_shapes(inputs))
    start = f"{why.rstrip('. ')}. " if why else ""
    raise PlanError(
        f"{start}No forward could be watched with inputs that the config gives ({tried[0]}"
        f"{f' and {len(tried) - 1} more' if tried[1:] else ''}): {first} Give an example of what "
        "forward takes: inputs=."
    ) from first


def _shapes(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(each.shape)}" for name, each in inputs.items())
