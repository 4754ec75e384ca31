"""Plan a model of transformers whose `tp_plan` does not fit, by watching an example forward."""

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
from shardproof.wording import short_text

_LONGEST_REASON = 300
_END = re.compile(r"\.\s")  # of a sentence


def has_example(model: nn.Module) -> bool:
    """Whether example inputs for the model can be made from its config."""
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
    sequence_parallel: bool = False,
) -> WatchedPlan:
    """Plan by watching one forward, with inputs made from the model's config.

    Args:
        model: of transformers; it may lie on the meta device.
        degree: how many ranks.
        scheme: leaves, numerics, seed.
        why: why the model's own tp_plan is not used.
        batch: rows of the inputs.
        length: tokens of a row.
        sequence_parallel: activations between blocks are cut along their tokens.

    Raises:
        PlanError: the forward runs with none of the example inputs, or a rank cannot do a step.
    """
    inputs, watched = _first_that_runs(model, examples(model, batch=batch, length=length), why)
    plan = plan_by_watching(
        model,
        inputs,
        degree=degree,
        scheme=scheme,
        watched=watched,
        sequence_parallel=sequence_parallel,
    )
    reason = f"{_first_sentence(why)}. So one" if why else "One"
    note = f"{reason} forward was watched, with inputs that the config gives: {_shapes(inputs)}"
    return replace(plan, notes=(*plan.notes, note))


def _first_sentence(why: str) -> str:
    """The first problem that an error lists, and how many more it has."""
    start, *problems = why.split("\n- ")
    first = _END.split(problems[0] if problems else start)[0].rstrip(".")
    more = f" ({len(problems) - 1} more like this)" if problems[1:] else ""
    return short_text(f"{start.strip()} {first}{more}" if problems else first, most=_LONGEST_REASON)


def watch_example(model: nn.Module) -> Watched:
    """Watch one forward of a model of transformers, with inputs made from its config.

    Raises:
        PlanError: the forward runs with none of the example inputs.
    """
    return _first_that_runs(model, examples(model), "")[1]


def _first_that_runs(
    model: nn.Module, examples: Iterable[dict[str, Any]], why: str
) -> tuple[dict[str, Any], Watched]:
    """Watch the forward with the first example inputs with which it runs."""
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
