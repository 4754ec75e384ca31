"""`parallelize`: check the whole plan on all ranks first, change the model second."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import PlanError
from shardproof.layers.activations import invariant_twin
from shardproof.layers.base import ShardedModule, check_state
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.leaves import check_degree
from shardproof.numerics import mode
from shardproof.plans.match import match
from shardproof.plans.style import ColumnParallel, Plan, Style

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DRAWING = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_SAMPLES = 64  # elements of each parameter that the ranks compare


def parallelize(model: nn.Module, plan: Plan | Mapping[str, Style | str], axis: Axis) -> nn.Module:
    """Cut a model in place: this rank keeps its shard of each module that the plan names.

    Linears become `ColumnParallelLinear` or `RowParallelLinear`. With invariant numerics,
    activations whose bits change with the cut or with threads (`nn.SiLU`, `nn.GELU`, ...) become
    ours; calls such as `F.silu` inside a forward cannot be seen, the prover names them.

    Args:
        model: the same on every rank, weights too, of which a sample is compared; on the meta
            device nothing is allocated.
        plan: pattern -> style, or a `Plan` with its scheme.
        axis: the ranks.

    Returns:
        `model`.

    Raises:
        PlanError: everything that is wrong with the plan, in one message; nothing was changed.
        DegreeError: the degree exceeds the plan's leaves.
        MismatchError: the ranks were given different plans, models or weights, or would compute
            with different products.
    """
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    # First of all: only what every rank has alike may decide whether a rank raises.
    comm.agree(_describe(plan, model), axis, what="plans or models")
    comm.agree(
        _sample_weights(model),
        axis,
        what="weights",
        way_out="The ranks' weights differ: seed every rank alike before the model is built (ranks "
        "as threads share one generator: build it once and copy it), or load the same state.",
    )
    comm.agree(
        {"contract": _contract(plan, model)},
        axis,
        what="arithmetic",
        way_out="Install the same torch and the same build of shardproof for every rank (one "
        "without a C compiler lacks the kernels), and set SHARDPROOF_BLAS and SHARDPROOF_CORE "
        "alike.",
    )
    check_degree(axis.size, plan.scheme.leaves)
    styles, problems = match(plan.styles, model)
    problems += _unfit(styles, model)
    twins = _twins(model) if plan.scheme.is_invariant else {}
    problems += _hooked([*styles, *twins], model)
    if plan.scheme.is_invariant:
        problems += _in_place(model) + _drawing(model)
    if problems:
        raise PlanError(
            f"the plan does not fit {type(model).__name__}: "
            + (problems[0] if len(problems) == 1 else "\n- " + "\n- ".join(problems))
        )
    for name, style in styles.items():
        _replace(model, name, _cut(model.get_submodule(name), style, name, plan, axis))
    for name, twin in twins.items():
        _replace(model, name, twin)
    model.register_load_state_dict_pre_hook(check_state)
    return model


def _describe(plan: Plan, model: nn.Module) -> dict[str, object]:
    """What every rank must have alike, entry by entry."""
    found: dict[str, object] = {
        "the order of the plan": list(plan.styles),
        "the scheme": plan.scheme,
        **{f"plan entry {pattern!r}": style for pattern, style in plan.styles.items()},
    }
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"module {name!r}" if name else "the model"] = type(module).__name__
    for name, value in model.named_parameters(remove_duplicate=False):
        # Where a weight is frozen on one rank only, that rank stays away from collectives.
        frozen = "" if value.requires_grad else " frozen"
        dtype = str(value.dtype).removeprefix("torch.")
        found[f"parameter {name!r}"] = f"{tuple(value.shape)} {dtype}{frozen}"
    return found


def _contract(plan: Plan, model: nn.Module) -> str:
    """What this process would compute the products of `model` with."""
    weight = next(model.parameters(), None)
    if weight is None:
        return mode.contract(plan.scheme)
    device = torch.device("cpu") if weight.is_meta else weight.device
    return mode.contract(plan.scheme, weight.dtype, device)


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


def _unfit(styles: Mapping[str, Style], model: nn.Module) -> list[str]:
    """Modules that a style names and that cannot be cut, one sentence each."""
    problems = []
    for name, style in styles.items():
        module = model.get_submodule(name)
        if isinstance(module, ShardedModule):
            problems.append(f"module {name!r} is cut already ({type(module).__name__}).")
        elif type(module) is not nn.Linear:
            problems.append(
                f"module {name!r} is a {type(module).__name__}, which {style} cannot cut: it takes "
                "nn.Linear. Name the linears inside it, or leave it replicated."
            )
        else:
            problems += _ties(name, module, model)
    return problems


def _ties(name: str, module: nn.Module, model: nn.Module) -> list[str]:
    """A weight that another module also uses would be cut on one side only."""
    own = {id(parameter) for parameter in module.parameters()}
    others = {
        other: None
        for other, candidate in model.named_modules(remove_duplicate=False)
        if other != name
        for parameter in candidate.parameters(recurse=False)
        if id(parameter) in own
    }
    return [
        f"module {name!r} shares its weight with {other!r}: a tied weight cannot be cut on one "
        "side only. Untie them, or leave both out of the plan."
        for other in others
    ]


def _hooked(names: Sequence[str], model: nn.Module) -> list[str]:
    """Modules that have hooks and would be replaced, one sentence each."""
    return [
        f"module {name!r} has hooks, which the {type(module).__name__} that is replaced would "
        "lose. Remove them (weight_norm too is one), and register them after parallelize."
        for name in names
        if (module := model.get_submodule(name)) and any(getattr(module, kind) for kind in _HOOKS)
    ]


def _in_place(model: nn.Module) -> list[str]:
    """Activations that would have to be replaced, and promise what ours do not keep."""
    return [
        f"module {name!r} is SiLU(inplace=True): its bits change with the cut, and the one that "
        "would replace it does not overwrite its input. Use nn.SiLU()."
        for name, module in model.named_modules()
        if type(module) is nn.SiLU and module.inplace
    ]


def _drawing(model: nn.Module) -> list[str]:
    """Modules that draw while they compute, each rank for itself, one sentence each."""
    return [
        f"module {name!r} is {type(module).__name__}(p={module.p}): it draws from the global "
        "generator, so that ranks would hold different activations where they must be the same. "
        "Set p=0 or use numerics='native'."
        for name, module in model.named_modules()
        if isinstance(module, _DRAWING) and module.p > 0
    ]


def _cut(module: nn.Module, style: Style, name: str, plan: Plan, axis: Axis) -> nn.Module:
    if isinstance(style, ColumnParallel):
        return ColumnParallelLinear.from_linear(
            module,  # type: ignore[arg-type]  # _unfit has seen that it is nn.Linear
            axis=axis,
            gather_input=style.gather_input,
            gather_output=style.gather_output,
            name=name,
            scheme=plan.scheme,
        )
    return RowParallelLinear.from_linear(
        module,  # type: ignore[arg-type]
        axis=axis,
        input_is_parallel=style.input_is_parallel,
        name=name,
        scheme=plan.scheme,
    )


def _twins(model: nn.Module) -> dict[str, nn.Module]:
    """The activations that ours replace."""
    found = {
        name: invariant_twin(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name
    }
    return {name: twin for name, twin in found.items() if twin is not None}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
