"""Replace modules that are not cut, but whose bits would depend on the degree or on threads.

With invariant numerics, activations and norms are replaced by ours. Dropout is replaced by dropout
whose masks are keyed by position.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from shardproof.axis import Axis
from shardproof.cut.deferred import Deferred
from shardproof.cut.tensor import CutTensor
from shardproof.layers.activations import invariant_replacement, why_refused
from shardproof.layers.dropout import dropout_replacement
from shardproof.layers.replicated_input import SameOnAllRanks
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
# Roles of modules that are not cut themselves, but whose children are.
GROUPS = ("attention", "shared input")


def names_replaced_by_cut_layers(plan: ModelPlan) -> list[str]:
    """Names of the modules that will be replaced by cut layers."""
    return [
        module.name for module in plan.modules if module.is_cut and module.role not in GROUPS
    ] + [
        f"{name}.{style.attend}"
        for name, style in plan.styles.items()
        if isinstance(style, Attention) and style.attend is not None
    ]


def replacements_of(
    model: nn.Module, plan: ModelPlan, scheme: Scheme, axis: Axis
) -> dict[str, nn.Module]:
    """Module name -> its replacement, for modules that are not cut."""
    replaced = set(names_replaced_by_cut_layers(plan))
    inside = _inside(plan)
    replacements: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name in replaced or name.startswith(inside):
            continue
        replacement: nn.Module | None = _dropout(name, module, scheme, axis)
        if replacement is None and scheme.is_invariant:
            replacement = invariant_replacement(module)
        if replacement is not None:
            replacements[name] = replacement
    return replacements


def _inside(plan: ModelPlan) -> tuple[str, ...]:
    """Prefixes of the names of modules that lie inside replaced modules."""
    return tuple(f"{name}." for name in names_replaced_by_cut_layers(plan))


def _dropout(name: str, module: nn.Module, scheme: Scheme, axis: Axis) -> nn.Module | None:
    """Dropout keyed by position, as the replacement of an `nn.Dropout`; None for other modules."""
    replacement = dropout_replacement(module, name=name, seed=scheme.seed)
    if replacement is not None and scheme.is_invariant:
        replacement.register_forward_pre_hook(_SameIfWhole(axis, name))
    return replacement


class _SameIfWhole(SameOnAllRanks):
    """A forward pre-hook: an input that is not cut must be the same on all ranks."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Compare the ranks' inputs.

        Raises:
            MismatchError: on all ranks, if their inputs differ.
        """
        if not isinstance(inputs[0], CutTensor | Deferred) and not inputs[0].is_meta:
            super().__call__(module, inputs)


def irreplaceable(
    model: nn.Module, replacements: Mapping[str, nn.Module], plan: ModelPlan
) -> list[str]:
    """One sentence for each module that would change bits and that has no replacement."""
    inside = _inside(plan)
    staying = {
        name: module for name, module in model.named_modules() if not name.startswith(inside)
    }
    return _activations(staying) + _drawing(staying, replacements)


def _activations(modules: Mapping[str, nn.Module]) -> list[str]:
    """One sentence for each activation whose bits would change and that has no replacement."""
    return [
        f"module {name!r} {why}"
        for name, module in modules.items()
        if (why := why_refused(module)) is not None
    ]


def _drawing(modules: Mapping[str, nn.Module], replacements: Mapping[str, nn.Module]) -> list[str]:
    """One sentence for each module that draws from the global generator in its forward."""
    return [
        f"module {name!r} is {type(module).__name__}(p={module.p}"
        f"{', inplace=True' if module.inplace else ''}): it draws from the global generator, so "
        "that ranks would hold different activations where they must be the same. Use nn.Dropout, "
        "which becomes dropout by position, p=0, or numerics='native'."
        for name, module in modules.items()
        if isinstance(module, _DRAWING) and module.p > 0 and name not in replacements
    ]
