"""`parallelize`: check the whole plan on all ranks, and only then change the model."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from shardproof.axis import Axis, checked_axis
from shardproof.checked_objects import checked_model
from shardproof.checked_values import checked_flag
from shardproof.errors import PlanError, ShardproofError
from shardproof.hf.cache import guard_cache
from shardproof.hf.detection import is_transformers
from shardproof.hf.generation import guard_generation
from shardproof.hf.inputs import note_inputs
from shardproof.hf.parameters import count_whole
from shardproof.hf.refused import guard_methods
from shardproof.layers import registry
from shardproof.layers.base import ShardedModule, check_state
from shardproof.numerics import mode
from shardproof.plans.by_example import plan_by_example
from shardproof.plans.by_names import cut_by_names, rehearse_by_names
from shardproof.plans.compiled import make_compilable
from shardproof.plans.hf_plan import entries_of
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.plan_argument import is_carried, read_plan
from shardproof.plans.planning import as_error, attempt
from shardproof.plans.replacements import (
    irreplaceable,
    names_replaced_by_cut_layers,
    replacements_of,
)
from shardproof.plans.sequence_parallel import cut_tokens
from shardproof.plans.style import Plan, Style
from shardproof.plans.unsupported import is_lazy
from shardproof.plans.watched import as_watched, call_by_forms, cut_by
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.scheme import DEFAULT_SCHEME, Scheme
from shardproof.wording import dtype_name, short_repr

Value = TypeVar("Value")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SAMPLES = 64  # elements of each parameter that the ranks compare


def parallelize(
    model: nn.Module,
    plan: ModelPlan | WatchedPlan | Plan | Mapping[str, Style | str] | None,
    axis: Axis,
    *,
    inputs: Any = None,
    scheme: Scheme = DEFAULT_SCHEME,
    sequence_parallel: bool = False,
) -> nn.Module:
    """Cut a model in place: this rank keeps its shard of each module that the plan names.

    Each cut module is replaced by a shardproof layer. With invariant numerics, norms and
    activations whose bits would change with the cut or with the number of threads are replaced too.
    Dropout is replaced by dropout keyed by position. With a plan of your own, the model's code
    between the cut layers computes with cut tensors, which show the shape of the whole tensor
    (`docs/plans.md`).

    A model of Hugging Face transformers keeps its own forward. Without `labels`,
    `model(...).logits` are gathered at once. With `labels`, they are gathered on their first use
    (`hf.CutLogits`).

    Args:
        model: the same on every rank, with the same weights (a sample of them is compared). For a
            model on the meta device nothing is allocated; `initialize` then creates the weights.
        plan: as in `sp.plan`, or the result of `sp.plan`.
        axis: the ranks that share the model.
        inputs: example inputs of `forward`, as in `sp.plan`. Without a plan, one forward is
            watched; with a plan, a step is rehearsed on every rank.
        scheme: leaves, numerics and seed, if `plan` is not a `Plan`, which has its own.
        sequence_parallel: while gradients are recorded, activations (B, T, n) between blocks are
            cut along the T tokens (Korthikanti et al. 2022). It changes no bit. A `plan` that was
            made with it needs no second word.

    Returns:
        `model`.

    Raises:
        PlanError: the plan does not fit; one message lists every problem, and nothing was changed.
        DegreeError: the degree exceeds the plan's leaves.
        MismatchError: the ranks have different plans, models or weights, or would compute products
            differently.
        UsageError: `plan` has a scheme, and `scheme` is given too.
    """
    axis = checked_axis(axis)
    checked_flag(sequence_parallel, "sequence_parallel")
    if isinstance(plan, ModelPlan | WatchedPlan):
        sequence_parallel |= plan.sequence_parallel
    if (inputs is not None and plan is None) or isinstance(plan, WatchedPlan):
        return _cut_as_watched(model, plan, axis, inputs, scheme, sequence_parallel)
    agreed_plan, agreed_scheme = _agree(model, plan, scheme, axis, sequence_parallel)
    known_plan = plan if isinstance(plan, ModelPlan) else agreed_plan
    outcome = attempt(model, known_plan, degree=axis.size, scheme=scheme)
    if not isinstance(outcome, str):
        return _cut_by_names(model, outcome, agreed_scheme, axis, inputs, sequence_parallel)
    return _cut_as_watched(model, None, axis, None, scheme, sequence_parallel, why=outcome)


def _cut_by_names(
    model: nn.Module,
    outcome: tuple[ModelPlan, list[str]],
    scheme: Scheme,
    axis: Axis,
    inputs: Any,
    sequence_parallel: bool,
) -> nn.Module:
    """Cut a model by a plan of names, if it has no problems."""
    model_plan, problems = outcome
    replacements = replacements_of(model, model_plan, scheme, axis)
    problems += _hooked([*names_replaced_by_cut_layers(model_plan), *replacements], model)
    if scheme.is_invariant:
        problems += irreplaceable(model, replacements, model_plan)
    if problems:
        raise PlanError(as_error(model, problems))
    rehearsal = None if inputs is None else rehearse_by_names(model, model_plan, inputs)
    whole = dict(model.named_parameters())
    region = cut_by_names(model, model_plan, replacements, axis)
    if rehearsal is not None:
        call_by_forms(model, rehearsal.calls, rehearsal.draws, region)
    if sequence_parallel:
        cut_tokens(model, model_plan, region)
    return _finished(model, whole, model_plan.scheme, axis)


def _cut_as_watched(
    model: Any,
    plan: Any,
    axis: Axis,
    inputs: Any,
    scheme: Any,
    sequence_parallel: bool,
    *,
    why: str = "",
) -> nn.Module:
    """Cut any model by watching one forward; `why` says why its own plan does not serve."""

    def read() -> tuple[WatchedPlan, dict[str, object]]:
        checked_model(model)
        watched_plan = (
            plan_by_example(
                model,
                degree=axis.size,
                scheme=scheme,
                why=why,
                sequence_parallel=sequence_parallel,
            )
            if why
            else as_watched(model, plan, axis.size, inputs, scheme, sequence_parallel)
        )
        words = _describe(Plan({}, watched_plan.scheme), watched_plan.scheme, model)
        return watched_plan, words | {
            "what is cut": [repr(family) for family in watched_plan.families],
            "sequence_parallel": sequence_parallel,
        }

    agreed_plan = _agreed(read, axis)
    _agree_on_numbers(model, agreed_plan.scheme, axis)
    whole = dict(model.named_parameters())
    cut_by(model, replace(agreed_plan, sequence_parallel=sequence_parallel), axis)
    return _finished(model, whole, agreed_plan.scheme, axis)


def _finished(
    model: nn.Module, whole: Mapping[str, nn.Parameter], scheme: Scheme, axis: Axis
) -> nn.Module:
    """Add the guards that refuse what a cut model can no longer do."""
    _note_replaced(model, whole)
    guard_methods(model)
    count_whole(model)
    if is_transformers(model):
        note_inputs(model, axis)
        if hasattr(model, "generate"):
            guard_generation(model, axis)
        guard_cache(model, axis)
    model.register_load_state_dict_pre_hook(check_state)
    make_compilable(model, is_invariant=scheme.is_invariant)
    return model


def _note_replaced(model: nn.Module, whole: Mapping[str, nn.Parameter]) -> None:
    """Remember the whole parameters that the cut model no longer has."""
    remaining_ids = {id(parameter) for parameter in model.parameters()}
    for name, parameter in whole.items():
        if id(parameter) not in remaining_ids:
            registry.note_replaced(parameter, name)


def _agree(
    model: Any, plan: Any, scheme: Any, axis: Axis, sequence_parallel: bool
) -> tuple[Plan | None, Scheme]:
    """Return the plan and the scheme; raise on all ranks if they differ between ranks."""

    def read() -> tuple[tuple[Plan | None, Scheme], dict[str, object]]:
        checked_model(model)
        own_plan, own_scheme = read_plan(plan, scheme)
        words: dict[str, object] = {
            "whether the model carries the plan": is_carried(plan),
            "sequence_parallel": sequence_parallel,
        }
        return (own_plan, own_scheme), _describe(own_plan, own_scheme, model) | words

    agreed_plan, agreed_scheme = _agreed(read, axis)
    _agree_on_numbers(model, agreed_scheme, axis)
    return agreed_plan, agreed_scheme


def _agreed(read: Callable[[], tuple[Value, dict[str, object]]], axis: Axis) -> Value:
    """Return the result of `read`; raise on all ranks if one rank fails or reads something else."""
    # This comes first: whether a rank raises may depend only on values that all ranks share.
    wrong: ShardproofError | None = None
    value: Any = None
    try:
        value, words = read()
    except ShardproofError as error:
        wrong, words = error, {"what is wrong with them": str(error)}
    axis.agree(words, what="plans or models")
    if wrong is not None:
        raise wrong
    agreed: Value = value
    return agreed


def _agree_on_numbers(model: nn.Module, scheme: Scheme, axis: Axis) -> None:
    """Raise on all ranks if their weights or their arithmetic differ."""
    axis.agree(
        sample_weights(model),
        what="weights",
        way_out="The ranks' weights differ: seed every rank alike before the model is built (ranks "
        "as threads share one generator: build it once and copy it), or load the same state.",
    )
    axis.agree(
        {"contract": contract_for(scheme, model)},
        what="arithmetic",
        way_out="Install the same torch and the same build of shardproof for every rank (one "
        "without a C compiler lacks the kernels), and set SHARDPROOF_BLAS and SHARDPROOF_CORE "
        "alike.",
    )


def _describe(plan: Plan | None, scheme: Scheme, model: nn.Module) -> dict[str, object]:
    """Everything that must be the same on every rank, entry by entry."""
    styles = entries_of(model) if plan is None else plan.styles
    description: dict[str, object] = {
        "the plan": "the model's own" if plan is None else "given",
        "the order of the plan": list(styles),
        "the scheme": scheme,
        **{f"plan entry {pattern!r}": _named(style) for pattern, style in styles.items()},
    }
    if is_transformers(model):
        description["a hash of the config"] = _hash_config(model.config)
    for name, module in model.named_modules(remove_duplicate=False):
        description[f"module {name!r}" if name else "the model"] = type(module).__name__
    cut = _cut_before(model)
    for name, value in model.named_parameters(remove_duplicate=False):
        # A weight that is frozen on one rank only would keep that rank out of a collective.
        frozen = "" if value.requires_grad else " frozen"
        dtype = dtype_name(value.dtype)
        shape = "no shape yet" if is_lazy(value) else cut.get(id(value), tuple(value.shape))
        description[f"parameter {name!r}"] = f"{shape} {dtype}{frozen}"
    return description


def _named(style: Any) -> Any:
    """A style in a form that can be sent to the other ranks; anything else as text."""
    return style if isinstance(style, get_args(Style)) else short_repr(style)


def _cut_before(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Id of each parameter that is cut already -> shape of the whole, the same on all ranks."""
    return {
        id(parameter): layout.shape
        for module in model.modules()
        if isinstance(module, ShardedModule)
        for _, parameter, layout in module.parameters_with_layouts()
    }


def _hash_config(config: Any) -> str:
    """A hash of a config of transformers, which alone holds eps, rotary angles and windows."""
    words = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def contract_for(scheme: Scheme, model: nn.Module) -> str:
    """The contract under which this process would compute the products of `model`."""
    weight = next(model.parameters(), None)
    if weight is None:
        return mode.contract(scheme)
    device = torch.device("cpu") if weight.is_meta else weight.device
    return mode.contract(scheme, weight.dtype, device)


def sample_weights(model: nn.Module, *, with_parts: bool = False) -> dict[str, object]:
    """A short hash of a few elements of every parameter, which detects another initialisation.

    Args:
        model: cut or not.
        with_parts: also hash the parts of cut parameters, for ranks that hold the same parts.
    """
    cut = {} if with_parts else _cut_before(model)
    return {
        f"a sample of {name!r}": hashlib.sha256(_sample(value)).hexdigest()[:16]
        for name, value in model.named_parameters()
        if not value.is_meta and id(value) not in cut and not is_lazy(value)
    }


def _sample(value: Tensor) -> bytes:
    """Bytes of some evenly spaced elements, for any strides; the other elements are not read."""
    count = min(value.numel(), _SAMPLES)
    if not count:
        return b""
    flat_indices = [place * value.numel() // count for place in range(count)]
    flat = torch.tensor(flat_indices, device=value.device)
    places = torch.unravel_index(flat, (1, *value.shape))
    sample = value.detach()[None][places].cpu()
    return sample.view(torch.uint8).numpy().tobytes()


def _hooked(names: Sequence[str], model: nn.Module) -> list[str]:
    """One sentence for each module whose hooks or own forward a replacement would lose."""
    problems = []
    for name in names:
        module = model.get_submodule(name)
        if any(getattr(module, kind) for kind in _HOOKS):
            problems.append(
                f"module {name!r} has hooks, which the {type(module).__name__} that is replaced "
                "would lose. Remove them, and register them after parallelize; where they are a "
                "norm or a mask of the weight (weight_norm, prune), make its result the weight "
                "first, with torch.nn.utils.remove_weight_norm or prune.remove."
            )
        if "forward" in vars(module):
            problems.append(
                f"module {name!r} has a forward of its own, which the {type(module).__name__} that "
                "is replaced would lose. Delete that attribute (del module.forward), put what it "
                "does into a module beside it, or leave it out of the plan."
            )
    return problems
