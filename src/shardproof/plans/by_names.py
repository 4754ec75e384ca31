"""Cut a model by module names, with a plan that was checked against the model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from shardproof.axis import Axis
from shardproof.cut.fallback import would_be_whole
from shardproof.cut.spec import Region
from shardproof.errors import PlanError, ShardproofError, UsageError
from shardproof.hf.attention_registry import use_our_attention
from shardproof.hf.detection import is_transformers
from shardproof.hf.head import adapt_head
from shardproof.plans.cutter import Cutter
from shardproof.plans.layer_forwards import accept_cut_tensors, connect_layers
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.rehearsal import rehearse
from shardproof.plans.replacements import replacements_of
from shardproof.plans.watched import as_call, call_by_forms
from shardproof.plans.watched_plan import Rehearsal


def cut_by_names(
    model: nn.Module, plan: ModelPlan, replacements: Mapping[str, nn.Module], axis: Axis
) -> Region:
    """Cut a model in place, so that this rank keeps its part; nothing is checked here.

    Args:
        model: the planned model, or a copy of it.
        plan: at the degree of the axis.
        replacements: name of a module that is not cut -> its replacement (`replacements_of`).
        axis: the ranks that share the model.

    Returns:
        The region of its cut tensors.

    Comm:
        none.
    """
    cutter = Cutter(model, plan.scheme, axis, plan.head, plan.attention_options)
    cutter.cut(plan.styles)
    for name, replacement in replacements.items():
        if not plan.is_carried:
            accept_cut_tensors(replacement, model.get_submodule(name))
        cutter.replace(name, replacement)
    if is_transformers(model):
        if cutter.attentions:
            use_our_attention(model, cutter.attentions)
        if plan.head is not None:
            adapt_head(model, model.get_submodule(plan.head))  # type: ignore[arg-type]
    region = Region(axis, plan.scheme)
    if not plan.is_carried:
        connect_layers(model, plan, region, cutter.replaced_norms)
    return region


def rehearse_by_names(model: nn.Module, plan: ModelPlan, inputs: Any) -> Rehearsal:
    """Rehearse one step on every rank, on copies of a model that are cut by a plan.

    Args:
        model: not cut yet.
        plan: how it is to be cut.
        inputs: what forward takes.

    Raises:
        PlanError: a rank cannot do the step, an operation needs the whole of a cut weight, or the
            model's own forward fails with the inputs.
    """

    def cut(model_copy: nn.Module, axis: Axis) -> Region:
        region = cut_by_names(
            model_copy, plan, replacements_of(model_copy, plan, plan.scheme, axis), axis
        )
        call_by_forms(model_copy, [name for name, _ in model_copy.named_modules()], (), region)
        return region

    try:
        rehearsal = rehearse(model, as_call(inputs), cut, degree=plan.degree, device="meta")
        if rehearsal.whole_weights:
            problems = [
                would_be_whole(operation, weight) for weight, operation in rehearsal.whole_weights
            ]
            raise UsageError(" ".join(problems))
    except ShardproofError as error:
        raise PlanError(f"the plan does not fit {type(model).__name__}: {error}") from error
    return rehearsal
