"""`parallelize`: check the whole plan on all ranks first, change the model second."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import PlanError
from shardproof.hf.attention import take_over
from shardproof.hf.generation import guard_generation
from shardproof.hf.head import adapt_head
from shardproof.hf.inputs import note_inputs
from shardproof.hf.models import is_transformers
from shardproof.hf.saving import guard_saving
from shardproof.layers.base import check_state
from shardproof.numerics import mode
from shardproof.plans.cut import Cutter
from shardproof.plans.hf_plan import entries_of
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.planning import as_error, draft
from shardproof.plans.style import Attention, Plan, Style
from shardproof.plans.twins import irreplaceable, replaced_by, twins_of
from shardproof.scheme import DEFAULT_SCHEME, Scheme

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SAMPLES = 64  # elements of each parameter that the ranks compare


def parallelize(
    model: nn.Module,
    plan: ModelPlan | Plan | Mapping[str, Style | str] | None,
    axis: Axis,
    *,
    scheme: Scheme = DEFAULT_SCHEME,
) -> nn.Module:
    """Cut a model in place: this rank keeps its shard of each module that the plan names.

    What is cut becomes a layer of ours. With invariant numerics, norms and activations whose bits
    change with the cut or with threads become ours too; calls such as `F.silu` inside a forward
    cannot be seen, the prover names them. Dropout becomes dropout by position.

    A model of Hugging Face transformers keeps its own forward. With `labels`, `model(...).logits`
    is this rank's part of the vocabulary, from which the loss is computed; without, it is whole.

    Args:
        model: the same on every rank, weights too, of which a sample is compared; on the meta
            device nothing is allocated (`initialize` then makes the weights).
        plan: pattern -> style, a `Plan` with its scheme, or what `plan` returned; None: the
            `tp_plan` that a model of transformers carries.
        axis: the ranks.
        scheme: leaves, numerics, seed; a `Plan` has its own.

    Returns:
        `model`.

    Raises:
        PlanError: everything that is wrong with the plan, in one message; nothing was changed.
        DegreeError: the degree exceeds the plan's leaves.
        MismatchError: the ranks were given different plans, models or weights, or would compute
            with different products.
        UsageError: `plan` has a scheme, and another one is given.
    """
    given = plan.plan if isinstance(plan, ModelPlan) else plan
    given = given if isinstance(given, Plan) or given is None else Plan(given, scheme)
    asked = given.scheme if given is not None else scheme
    _agree(given, asked, model, axis)
    made, problems = draft(model, given, degree=axis.size, scheme=scheme)
    twins = twins_of(model, made, asked, axis)
    problems += _hooked([*replaced_by(made), *twins], model)
    if asked.is_invariant:
        problems += irreplaceable(model, twins)
    if not is_transformers(model):
        problems += _unattended(made)
    if problems:
        raise PlanError(as_error(model, problems))
    _change(model, made, twins, axis)
    model.register_load_state_dict_pre_hook(check_state)
    return model


def _agree(plan: Plan | None, scheme: Scheme, model: nn.Module, axis: Axis) -> None:
    """Raise on all ranks unless they were given the same."""
    # First of all: only what every rank has alike may decide whether a rank raises.
    comm.agree(_describe(plan, scheme, model), axis, what="plans or models")
    comm.agree(
        _sample_weights(model),
        axis,
        what="weights",
        way_out="The ranks' weights differ: seed every rank alike before the model is built (ranks "
        "as threads share one generator: build it once and copy it), or load the same state.",
    )
    comm.agree(
        {"contract": _contract(scheme, model)},
        axis,
        what="arithmetic",
        way_out="Install the same torch and the same build of shardproof for every rank (one "
        "without a C compiler lacks the kernels), and set SHARDPROOF_BLAS and SHARDPROOF_CORE "
        "alike.",
    )


def _change(model: nn.Module, made: ModelPlan, twins: Mapping[str, nn.Module], axis: Axis) -> None:
    """Do what has been checked."""
    cutter = Cutter(model, made.scheme, axis, made.head)
    cutter.cut(made.styles)
    for name, twin in twins.items():
        cutter.replace(name, twin)
    if not is_transformers(model):
        return
    if cutter.attentions:
        take_over(model, cutter.attentions)
    if made.head is not None:
        adapt_head(model, model.get_submodule(made.head))  # type: ignore[arg-type]
    note_inputs(model, axis)
    if hasattr(model, "generate"):
        guard_generation(model, axis)
    guard_saving(model)


def _unattended(made: ModelPlan) -> list[str]:
    """Attention modules in which nothing of ours could compute, one sentence each."""
    return [
        f"module {name!r}: Attention without attend= is for models of transformers. Let a child "
        "compute the attention (forward(q, k, v) of shape (batch, heads, length, head_dim)), and "
        "give its name as attend=."
        for name, style in made.styles.items()
        if isinstance(style, Attention) and style.attend is None
    ]


def _describe(plan: Plan | None, scheme: Scheme, model: nn.Module) -> dict[str, object]:
    """What every rank must have alike, entry by entry."""
    styles = entries_of(model) if plan is None else plan.styles
    found: dict[str, object] = {
        "the plan": "the model's own" if plan is None else "given",
        "the order of the plan": list(styles),
        "the scheme": scheme,
        **{f"plan entry {pattern!r}": style for pattern, style in styles.items()},
    }
    if is_transformers(model):
        found["a hash of the config"] = _hash_config(model.config)
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"module {name!r}" if name else "the model"] = type(module).__name__
    for name, value in model.named_parameters(remove_duplicate=False):
        # Where a weight is frozen on one rank only, that rank stays away from collectives.
        frozen = "" if value.requires_grad else " frozen"
        dtype = str(value.dtype).removeprefix("torch.")
        found[f"parameter {name!r}"] = f"{tuple(value.shape)} {dtype}{frozen}"
    return found


def _hash_config(config: Any) -> str:
    """Of all that a config of transformers says: eps, angles and windows are there alone."""
    words = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _contract(scheme: Scheme, model: nn.Module) -> str:
    """What this process would compute the products of `model` with."""
    weight = next(model.parameters(), None)
    if weight is None:
        return mode.contract(scheme)
    device = torch.device("cpu") if weight.is_meta else weight.device
    return mode.contract(scheme, weight.dtype, device)


def _sample_weights(model: nn.Module) -> dict[str, object]:
    """A short hash of a few elements of every parameter: enough to tell one draw from another."""
    return {
        f"a sample of {name!r}": hashlib.sha256(_sample(value)).hexdigest()[:16]
        for name, value in model.named_parameters()
        if not value.is_meta
    }


def _sample(value: Tensor) -> bytes:
    """Bytes of some evenly spaced elements, whatever the strides; the rest is not touched."""
    count = min(value.numel(), _SAMPLES)
    if not count:
        return b""
    flat = torch.tensor([place * value.numel() // count for place in range(count)])
    places = torch.unravel_index(flat.to(value.device), (1, *value.shape))
    sample = value.detach()[None][places].cpu()
    return sample.view(torch.uint8).numpy().tobytes()


def _hooked(names: Sequence[str], model: nn.Module) -> list[str]:
    """Modules that have hooks and would be replaced, one sentence each."""
    return [
        f"module {name!r} has hooks, which the {type(module).__name__} that is replaced would "
        "lose. Remove them (weight_norm too is one), and register them after parallelize."
        for name in names
        if (module := model.get_submodule(name)) and any(getattr(module, kind) for kind in _HOOKS)
    ]
