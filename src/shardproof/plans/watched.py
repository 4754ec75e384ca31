"""A plan that is found by watching one forward, and the model that is cut by it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.block_layout import cut_layout
from shardproof.cut import rules
from shardproof.cut.calls import Calling
from shardproof.cut.spec import Region
from shardproof.cut.tensor import cut_tensor
from shardproof.layers import registry
from shardproof.layers.cut_module import cut_parameters
from shardproof.leaves import Layout, check_degree
from shardproof.scheme import Scheme
from shardproof.units import CutDim, Shared
from shardproof.watching import Family, choose, families, watch

assert rules  # noqa: S101 - imported for what it registers


@dataclass(frozen=True)
class WatchedPlan:
    """How a model is cut, as one forward showed that it can be.

    Attributes:
        model: its class.
        degree: how many ranks share it.
        scheme: leaves, numerics, seed.
        families: what is cut together: units, and the dims of parameters that they lie in.
        whole: for every parameter that stays whole one sentence that says why.
        share: the part of the weights of matrices that is cut.
        shapes: of every parameter.
        calls: modules whose own code draws, or calls what has a form of its own.
    """

    model: str
    degree: int
    scheme: Scheme
    families: tuple[Family, ...]
    whole: Mapping[str, str]
    share: float
    shapes: Mapping[str, tuple[int, ...]]
    calls: frozenset[str] = field(default_factory=frozenset)

    def layouts(self, rank: int) -> dict[str, Layout]:
        """How every cut parameter lies on a rank."""
        return {
            name: cut_layout(self.shapes[name], rank, dim=dim, along=along)
            for name, (dim, along) in self.cuts.items()
        }

    @cached_property
    def cuts(self) -> dict[str, tuple[int, CutDim]]:
        """Parameter -> the dim that is cut, and how."""
        found: dict[str, tuple[int, CutDim]] = {}
        for family in self.families:
            shared = Shared(family.units, self.scheme.leaves, self.degree)
            for (name, dim), blocks in family.dims.items():
                found[name] = (dim, CutDim(shared, tuple(blocks)))
        return found


def plan_by_watching(
    model: nn.Module, inputs: Any, *, degree: int, scheme: Scheme
) -> WatchedPlan:
    """Watch one forward, and choose what is cut.

    Args:
        model: any module; on the meta device, if you like.
        inputs: what forward takes: a tuple of arguments, a dict of named ones, or one tensor.
        degree: how many ranks.
        scheme: leaves, numerics, seed.
    """
    check_degree(degree, scheme.leaves)
    args, kwargs = as_call(inputs)
    watched = watch(model, args, kwargs)
    choice = choose(families(watched), watched)
    return WatchedPlan(
        type(model).__name__,
        degree,
        scheme,
        choice.families,
        choice.whole,
        choice.share,
        watched.shapes,
        frozenset(name for name, _ in model.named_modules()),
    )


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in order and by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


_KNOWN = "_shardproof_specs"


def _as_cut(parameter: nn.Parameter, layout: Layout, module: nn.Module, name: str) -> Any:
    """What code of a module reads as a parameter that is cut."""
    spec, who = module.__dict__[_KNOWN][name]
    return cut_tensor(parameter, spec, who)


def cut_by(model: nn.Module, plan: WatchedPlan, axis: Axis) -> Region:
    """Keep of a model what this rank holds, in place; nothing is checked here.

    Returns:
        The region of its cut tensors.
    """
    region = Region(axis, plan.scheme)
    region.kept.update(id(each) for each in model.buffers())
    modules = dict(model.named_modules())
    places = {
        id(parameter): name for name, parameter in model.named_parameters() if name in plan.cuts
    }
    kept = [
        (module, own, places[id(parameter)])
        for module in modules.values()
        for own, parameter in module._parameters.items()
        if id(parameter) in places
    ]
    cut_parameters(
        model, plan.layouts(axis.rank), axis=axis, scheme=plan.scheme, wrap=_as_cut
    )
    for module, own, name in kept:
        dim, along = plan.cuts[name]
        known = module.__dict__.setdefault(_KNOWN, {})
        known[own] = region.spec(plan.shapes[name], dim, along), registry.record_of(module).name
    for name in plan.calls:
        Calling(region, name).hook(modules[name])
    return region


