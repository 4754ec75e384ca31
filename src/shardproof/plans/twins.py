"""What takes the place of a module that is not cut, where torch's own would break the promise.

Activations and norms become ours with invariant numerics, dropout becomes dropout by position.
"""

from collections.abc import Mapping

from torch import nn

from shardproof.axis import Axis
from shardproof.layers.activations import invariant_twin, why_refused
from shardproof.layers.dropout import dropout_twin
from shardproof.layers.whole import SameOnAllRanks
from shardproof.leaves import Cut
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Attention, ColumnParallel
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


def replaced_by(made: ModelPlan) -> list[str]:
    """Names of the modules that cut ones will replace."""
    return [
        module.name for module in made.modules if module.is_cut and module.role not in GROUPS
    ] + [
        f"{name}.{style.attend}"
        for name, style in made.styles.items()
        if isinstance(style, Attention) and style.attend is not None
    ]


def twins_of(model: nn.Module, made: ModelPlan, scheme: Scheme, axis: Axis) -> dict[str, nn.Module]:
    """Module name -> what takes its place although it is not cut."""
    replaced = set(replaced_by(made))
    inside = _inside(made)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name in replaced or name.startswith(inside):
            continue
        twin: nn.Module | None = _dropout(name, module, model, made, scheme, axis)
        if twin is None and scheme.is_invariant:
            twin = invariant_twin(module)
        if twin is not None:
            found[name] = twin
    return found


def _inside(made: ModelPlan) -> tuple[str, ...]:
    """What the names of modules begin with that are inside replaced ones, and go with them."""
    return tuple(f"{name}." for name in replaced_by(made))


def _dropout(
    name: str,
    module: nn.Module,
    model: nn.Module,
    made: ModelPlan,
    scheme: Scheme,
    axis: Axis,
) -> nn.Module | None:
    """Dropout by position for an `nn.Dropout`; by leaf where its input is seen to be cut."""
    column = _column_before(name, model, made)
    if column is not None:
        cut = Cut(column.out_features, scheme.leaves, axis.size)
        return dropout_twin(module, name=name, seed=scheme.seed, axis=axis, cut=cut)
    twin = dropout_twin(module, name=name, seed=scheme.seed)
    if twin is not None and scheme.is_invariant:
        twin.register_forward_pre_hook(SameOnAllRanks(axis, name))
    return twin


def _column_before(name: str, model: nn.Module, made: ModelPlan) -> nn.Linear | None:
    """The linear whose cut output reaches a child of an `nn.Sequential`; None: it is whole."""
    parent, _, child = name.rpartition(".")
    siblings = model.get_submodule(parent)
    if not isinstance(siblings, nn.Sequential):
        return None
    found: nn.Linear | None = None
    for other, sibling in siblings.named_children():
        if other == child:
            break
        style = made.styles.get(f"{parent}.{other}" if parent else other)
        if isinstance(style, ColumnParallel) and not style.gather_output:
            found = sibling if isinstance(sibling, nn.Linear) else None
        elif style is not None or isinstance(sibling, nn.Linear):
            found = None
    return found


def irreplaceable(model: nn.Module, twins: Mapping[str, nn.Module], made: ModelPlan) -> list[str]:
    """Modules that break the promise and that nothing of ours can replace, one sentence each."""
    inside = _inside(made)
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
