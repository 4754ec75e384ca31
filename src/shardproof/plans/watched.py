"""Plan a model by watching one forward, and cut it by that plan."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.checking import is_checked
from shardproof.cut import all_rules
from shardproof.cut.along_tokens import rms_normed
from shardproof.cut.deferred import Deferred, opened
from shardproof.cut.matrix_products import product
from shardproof.cut.module_calls import Calling
from shardproof.cut.own_tokens import tokens_of
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor, must_call_torch, unseen
from shardproof.errors import PlanError, UsageError
from shardproof.hf.detection import is_conv1d
from shardproof.layers import registry
from shardproof.layers.base import is_ours
from shardproof.layers.cut_module import cut_parameters
from shardproof.layers.rms_formula import find_formula
from shardproof.leaves import Layout, check_degree
from shardproof.ops.norms import whole_rms_norm
from shardproof.ops.rms_norm import RmsFormula
from shardproof.plans.rehearsal import rehearse
from shardproof.plans.sequence_parallel import cut_tokens
from shardproof.plans.watched_plan import Rehearsal, WatchedPlan
from shardproof.scheme import DEFAULT_SCHEME, Scheme, checked_scheme
from shardproof.watching import Watched, choose, families, watch

assert all_rules  # noqa: S101 - imported for what it registers

_SPECS = "_shardproof_specs"  # attribute of a module that holds parts: parameter -> spec and name
_EVERYWHERE = Rehearsal("", ())
_ON_CPU = (
    "on the CPU, with small weights in place of those on the meta device: what other data would do "
    "was not seen"
)


def plan_by_watching(
    model: nn.Module,
    inputs: Any,
    *,
    degree: int,
    scheme: Scheme,
    watched: Watched | None = None,
    sequence_parallel: bool = False,
) -> WatchedPlan:
    """Watch one forward, choose what is cut, and rehearse a step on every rank.

    Args:
        model: any module; it may lie on the meta device.
        inputs: example inputs of `forward`: a tuple, a dict of named ones, or one tensor.
        degree: number of ranks.
        scheme: leaves, numerics and seed.
        watched: the forward with these inputs, if it was watched before.
        sequence_parallel: activations between blocks are cut along their tokens.

    Raises:
        PlanError: the model's own forward fails with the inputs, or a rank cannot do a step.
        DegreeError: the degree exceeds the leaves.
    """
    check_degree(degree, scheme.leaves)
    args, kwargs = as_call(inputs)
    watched = watched or watch(model, args, kwargs)
    all_families = families(watched)
    named = dict(model.named_parameters())
    dtypes = {name: named[name].dtype for name in watched.shapes}
    whole_weights: dict[str, str] = {}  # weight that an operation needs whole -> that operation
    while True:
        choice = choose(all_families, watched, whole_weights=whole_weights)
        plan = WatchedPlan(
            type(model).__name__,
            degree,
            scheme,
            choice.families,
            choice.whole,
            watched.shapes,
            dtypes,
            _EVERYWHERE,
        )
        rehearsal = _rehearsed(model, (args, kwargs), plan, watched)
        if sequence_parallel and not rehearsal.whole_weights:
            plan = replace(plan, sequence_parallel=True)
            of_tokens = _rehearsed(model, (args, kwargs), plan, watched)
            # Without gradients, or with views, activations are whole, and need what these need.
            rehearsal = replace(
                of_tokens,
                calls=rehearsal.calls | of_tokens.calls,
                draws=rehearsal.draws | of_tokens.draws,
            )
        if not rehearsal.whole_weights:
            return replace(plan, rehearsal=rehearsal, notes=_notes(watched, rehearsal))
        whole_weights |= dict(rehearsal.whole_weights)


def as_watched(
    model: nn.Module,
    plan: Any,
    degree: int,
    inputs: Any,
    scheme: Any,
    sequence_parallel: bool = False,
) -> WatchedPlan:
    """The watched plan that `parallelize` received, or a new one made by watching now.

    Raises:
        UsageError: inputs or another scheme are given beside a watched plan.
        PlanError: the plan was made for another degree or another model.
    """
    if plan is None:
        return plan_by_watching(
            model,
            inputs,
            degree=degree,
            scheme=checked_scheme(scheme),
            sequence_parallel=sequence_parallel,
        )
    if inputs is not None or scheme not in (DEFAULT_SCHEME, plan.scheme):
        what = "inputs are" if inputs is not None else "another scheme is"
        raise UsageError(f"the plan was made by watching, and {what} given. Give the plan alone.")
    if plan.degree != degree:
        raise PlanError(
            f"the plan is for degree {plan.degree}, and the axis has {degree} ranks. Make it with "
            f"degree={degree}."
        )
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    if shapes != dict(plan.shapes):
        name = next(n for n in {**shapes, **plan.shapes} if shapes.get(n) != plan.shapes.get(n))
        raise PlanError(
            f"the plan is for another model: {name!r} has shape {plan.shapes.get(name)} in it and "
            f"{shapes.get(name)} in this {type(model).__name__}. Plan the model that is cut."
        )
    return plan


def _rehearsed(
    model: nn.Module, call: tuple[Any, Any], plan: WatchedPlan, watched: Watched
) -> Rehearsal:
    everywhere = frozenset(name for name, _ in model.named_modules())
    trial = replace(plan, rehearsal=replace(_EVERYWHERE, calls=everywhere))

    def cut(model_copy: nn.Module, axis: Axis) -> Region:
        return cut_by(model_copy, trial, axis)

    return rehearse(model, call, cut, degree=plan.degree, device=watched.device)


def _notes(watched: Watched, rehearsal: Rehearsal) -> tuple[str, ...]:
    if watched.device == rehearsal.device == "meta":
        return ()
    if watched.device == "meta":
        return (f"a step of the cut model depends on data, so it was rehearsed {_ON_CPU}",)
    return (f"the forward depends on data ({watched.why_cpu}), so it was watched {_ON_CPU}",)


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in order and by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


def _as_cut(parameter: nn.Parameter, layout: Layout, module: nn.Module, name: str) -> Any:
    """The cut tensor that code of a module gets when it reads a cut parameter."""
    spec, who = module.__dict__[_SPECS][name]
    return cut_tensor(parameter, spec, who)


def cut_by(model: nn.Module, plan: WatchedPlan, axis: Axis) -> Region:
    """Cut a model in place, so that this rank keeps its part; nothing is checked here.

    With `plan.sequence_parallel` it also cuts activations along their tokens.

    Args:
        model: the planned model, or a copy of it.
        plan: made for the degree of the axis.
        axis: the ranks that share the model.

    Returns:
        The region of its cut tensors.

    Comm:
        none.
    """
    region = Region(axis, plan.scheme)
    region.keep(model)
    modules = dict(model.named_modules())
    places = {
        id(parameter): name for name, parameter in model.named_parameters() if name in plan.cuts
    }
    cut_weights = [
        (module, own, places[id(parameter)])
        for module in modules.values()
        for own, parameter in module._parameters.items()
        if id(parameter) in places
    ]
    cut_parameters(model, plan.layouts(axis.rank), axis=axis, scheme=plan.scheme, wrap=_as_cut)
    for module, own, name in cut_weights:
        dim, along = plan.cuts[name]
        specs = module.__dict__.setdefault(_SPECS, {})
        specs[own] = region.spec(plan.shapes[name], dim, along), registry.record_of(module).name
    region.know_weights(model)
    cut = {module for module, _, _ in cut_weights}
    for module in modules.values():
        if "forward" in vars(module):
            continue  # of the user's own
        if module in cut:
            _put_linear(module)
        else:
            _put_norm(module)
    call_by_forms(model, plan.rehearsal.calls, plan.rehearsal.draws, region)
    if plan.sequence_parallel:
        cut_tokens(model, plan, region)
    return region


def call_by_forms(
    model: nn.Module, calls: Collection[str], draws: Collection[str], region: Region
) -> None:
    """Make random draws in the modules' own code keyed by position, and its results invariant.

    Args:
        model: the cut model.
        calls: names of modules whose own code calls operations that have an invariant form.
        draws: names of modules whose own code draws random numbers.
        region: the region of the model's cut tensors.
    """
    modules = dict(model.named_modules())
    needing = {name for name in (*calls, *draws) if name in modules and not is_ours(modules[name])}
    for name in sorted(needing | _inside(modules, needing & set(calls))):
        Calling(region, name, calls=name in calls, draws=name in draws).hook(modules[name])


def _put_linear(module: nn.Module) -> None:
    """Let a linear with a cut weight call its product directly.

    That is faster, and a linear that views its input as a matrix keeps its dims.
    """
    kind = getattr(module, "whole_class", None)
    is_transposed = kind is not None and is_conv1d(kind)
    if (kind is nn.Linear or is_transposed) and "weight" in module.__dict__[_SPECS]:
        module.forward = partial(_linear, module, is_transposed)


def _linear(module: nn.Module, is_transposed: bool, input: Any) -> Any:
    region = module.__dict__[_SPECS]["weight"][0].region
    keeps_dims = is_transposed and region.cuts_tokens and not is_checked()
    if module._parameters.get("weight") is None or (must_call_torch() and not keeps_dims):
        return type(module).forward(module, input)
    weight, bias = (_as_operand(module, name) for name in ("weight", "bias"))
    return unseen(product, opened(input), weight, bias, is_transposed=is_transposed)


def _as_operand(module: nn.Module, name: str) -> Any:
    parameter, cut = module._parameters[name], module.__dict__[_SPECS].get(name)
    return parameter if cut is None or parameter is None else CutTensor(parameter, *cut)


def _put_norm(module: nn.Module) -> None:
    """Let a module that computes an RMSNorm compute it in one step, on whole tensors."""
    formula = find_formula(module)
    if formula is not None:
        module.forward = partial(_normed, module, formula)


def _normed(module: nn.Module, formula: RmsFormula, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs and tokens_of(args[0]) is not None:
        return unseen(rms_normed, args[0], module.weight, formula)
    if len(args) != 1 or kwargs or isinstance(args[0], CutTensor | Deferred):
        return type(module).forward(module, *args, **kwargs)
    return unseen(whole_rms_norm, args[0], module.weight, formula)


def _inside(modules: Mapping[str, nn.Module], calls: Collection[str]) -> set[str]:
    """Modules that need no `Calls` but lie inside a module that does, and that have children.

    Modules without children run too briefly for this to be worth while.
    """
    is_on, inner = {"": "" in calls}, set()
    for name, module in modules.items():
        if name:
            is_on[name] = name in calls or is_on[name.rpartition(".")[0]]
        is_called = type(module).forward is not nn.Module.forward
        if is_on[name] and name not in calls and is_called and any(module.children()):
            is_on[name] = False
            inner.add(name)
    return inner
