"""What takes the place of a module that is not cut, where torch's own would break the promise.

Activations and norms become ours with invariant numerics, dropout becomes dropout by position.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from shardproof.axis import Axis
from shardproof.cut.deferred import Deferred
from shardproof.cut.tensor import CutTensor
from shardproof.layers.activations import invariant_twin, why_refused
from shardproof.layers.dropout import dropout_twin
from shardproof.layers.whole import SameOnAllRanks
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Attention
from shardproof.scheme import Scheme

_DRAWING = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# Roles of modules whose children are cut, and not they.
GROUPS = ("attention", "shared input")


def replaced_by(plan: ModelPlan) -> list[str]:
    """Names of the modules that cut ones will replace."""
    return [
        module.name for module in plan.modules if module.is_cut and module.role not in GROUPS
    ] + [
        f"{name}.{style.attend}"
        for name, style in plan.styles.items()
        if isinstance(style, Attention) and style.attend is not None
    ]


def twins_of(model: nn.Module, plan: ModelPlan, scheme: Scheme, axis: Axis) -> dict[str, nn.Module]:
    """Module name -> what takes its place although it is not cut."""
    replaced = set(replaced_by(plan))
    inside = _inside(plan)
    replacements: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name in replaced or name.startswith(inside):
            continue
        twin: nn.Module | None = _dropout(name, module, scheme, axis)
        if twin is None and scheme.is_invariant:
            twin = invariant_twin(module)
        if twin is not None:
            replacements[name] = twin
    return replacements


def _inside(plan: ModelPlan) -> tuple[str, ...]:
    """What the names of modules begin with that are inside replaced ones, and go with them."""
    return tuple(f"{name}." for name in replaced_by(plan))


def _dropout(name: str, module: nn.Module, scheme: Scheme, axis: Axis) -> nn.Module | None:
    """Dropout by position for an `nn.Dropout`."""
    twin = dropout_twin(module, name=name, seed=scheme.seed)
    if twin is not None and scheme.is_invariant:
        twin.register_forward_pre_hook(_SameIfWhole(axis, name))
    return twin


class _SameIfWhole(SameOnAllRanks):
    """A forward pre-hook: a cut tensor may be cut, and any other must be the same on all ranks."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Compare the ranks' inputs.

        Raises:
            MismatchError: on all ranks, if one has another input.
        """
        if not isinstance(inputs[0], CutTensor | Deferred) and not inputs[0].is_meta:
            super().__call__(module, inputs)


def irreplaceable(model: nn.Module, twins: Mapping[str, nn.Module], plan: ModelPlan) -> list[str]:
    """Modules that break the promise and that nothing of ours can replace, one sentence each."""
    inside = _inside(plan)
    staying = {
        name: module for name, module in model.named_modules() if not name.startswith(inside)
    }
    return _activations(staying) + _drawing(staying, twins)


def _activations(modules: Mapping[str, nn.Module]) -> list[str]:
    """Activations that cannot stay and that ours cannot replace, one sentence each."""
    return [
        f"module {name!r} {why}"
        for name, module in modules.items()
        if (why := why_refused(module)) is not None
    ]


def _drawing(modules: Mapping[str, nn.Module], twins: Mapping[str, nn.Module]) -> list[str]:
    """Modules that draw while they compute, each rank for itself, one sentence each."""
    return [
        f"module {name!r} is {type(module).__name__}(p={module.p}"
        f"{', inplace=True' if module.inplace else ''}): it draws from the global generator, so "
        "that ranks would hold different activations where they must be the same. Use nn.Dropout, "
        "which becomes dropout by position, p=0, or numerics='native'."
        for name, module in modules.items()
        if isinstance(module, _DRAWING) and module.p > 0 and name not in twins
    ]
