"""Cut a model by the names in a plan, which has been checked against it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from shardproof.axis import Axis
from shardproof.cut.fallback import would_be_whole
from shardproof.cut.spec import Region
from shardproof.errors import PlanError, ShardproofError, UsageError
from shardproof.hf.attention_registry import take_over
from shardproof.hf.detection import is_transformers
from shardproof.hf.head import adapt_head
from shardproof.plans.cutter import Cutter
from shardproof.plans.layer_forwards import hand_on, meet_cut_tensors
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.rehearsal import rehearse
from shardproof.plans.replacements import twins_of
from shardproof.plans.watched import as_call, call_by_forms
from shardproof.plans.watched_plan import Rehearsal


def cut_by_names(
    model: nn.Module, plan: ModelPlan, twins: Mapping[str, nn.Module], axis: Axis
) -> Region:
    """Keep of a model what this rank holds, in place; nothing is checked here.

    Args:
        model: the one that was planned, or one like it.
        plan: at the degree of the axis.
        twins: name of a module that is not cut -> what takes its place (`twins_of`).
        axis: the ranks.

    Returns:
        The region of its cut tensors.

    Comm:
        none.
    """
    cutter = Cutter(model, plan.scheme, axis, plan.head, plan.manners)
    cutter.cut(plan.styles)
    for name, twin in twins.items():
        if not plan.is_carried:
            meet_cut_tensors(twin, model.get_submodule(name))
        cutter.replace(name, twin)
    if is_transformers(model):
        if cutter.attentions:
            take_over(model, cutter.attentions)
        if plan.head is not None:
            adapt_head(model, model.get_submodule(plan.head))  # type: ignore[arg-type]
    region = Region(axis, plan.scheme)
    if not plan.is_carried:
        hand_on(model, plan, region, cutter.stood)
    return region


def rehearse_by_names(model: nn.Module, plan: ModelPlan, inputs: Any) -> Rehearsal:
    """One step on every rank, of copies of a model that are cut by a plan.

    Args:
        model: not cut yet.
        plan: how it is to be cut.
        inputs: what forward takes.

    Raises:
        PlanError: a rank cannot do the step, an operation would make a cut weight whole, or the
            model's own forward fails with the inputs.
    """

    def cut(copied: nn.Module, axis: Axis) -> Region:
        region = cut_by_names(copied, plan, twins_of(copied, plan, plan.scheme, axis), axis)
        call_by_forms(copied, [name for name, _ in copied.named_modules()], (), region)
        return region

    try:
        rehearsal = rehearse(model, as_call(inputs), cut, degree=plan.degree, device="meta")
        if rehearsal.wanted_whole:
            problems = [
                would_be_whole(operation, weight) for weight, operation in rehearsal.wanted_whole
            ]
            raise UsageError(" ".join(problems))
    except ShardproofError as error:
        raise PlanError(f"the plan does not fit {type(model).__name__}: {error}") from error
    return rehearsal
