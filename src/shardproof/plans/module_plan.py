"""`ModulePlan`: how one module is cut, and the collectives that it makes. Plain data."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from shardproof.leaves import Layout
from shardproof.plans.collective import Collective
from shardproof.plans.plan_text import alike, together
from shardproof.plans.style import Style
from shardproof.wording import dtype_name

Role = Literal[
    "column",
    "row",
    "vocabulary",
    "attention",
    "query",
    "key",
    "value",
    "output",
    "query_norm",
    "key_norm",
    "shared input",
    "whole",
]


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter on every rank.

    Attributes:
        name: its name within the module.
        dtype: dtype of its elements.
        layouts: by rank; `layouts[rank].local_shape` is the shape that this rank holds.
        tied_to: full name of the tied parameter, if that was counted before.
    """

    name: str
    dtype: torch.dtype
    layouts: tuple[Layout, ...]
    tied_to: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.layouts[0].shape

    @property
    def is_cut(self) -> bool:
        """False if every rank holds the whole."""
        return not self.layouts[0].is_replicated

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        return _numel(self.shape) * self.dtype.itemsize

    @property
    def held_bytes(self) -> tuple[int, ...]:
        """Bytes that each rank holds."""
        return tuple(held * self.dtype.itemsize for held, _ in _elements(self.layouts))

    @property
    def owned_bytes(self) -> tuple[int, ...]:
        """Bytes that each rank owns, that is, contributes to sums, norms and hashes.

        A parameter that is not cut counts on every rank.
        """
        return tuple(owned * self.dtype.itemsize for _, owned in _elements(self.layouts))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        first = self.layouts[0]
        return {
            "name": self.name,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
            "dim": first.dim,
            "tied_to": self.tied_to,
            "bytes": self.nbytes,
            "ranks": [
                {
                    "shape": list(layout.local_shape),
                    "owned": [[run.start, run.stop] for run in layout.owned_runs],
                    "held_bytes": held,
                    "owned_bytes": owned,
                }
                for layout, held, owned in zip(
                    self.layouts, self.held_bytes, self.owned_bytes, strict=True
                )
            ],
        }


@dataclass(frozen=True)
class ModulePlan:
    """One module: how it is cut, and what it costs.

    Attributes:
        name: name of the module.
        kind: name of its class.
        role: how it is cut; "whole" if every rank holds all of it.
        style: the style that cuts it (that of the attention for its children), or None.
        parameters: its own parameters; none for an attention and for a shared input.
        leaves: number of leaves of the cut dim; None if it is not cut.
        idle: ranks that hold no part of it.
        collectives: the collectives that it makes in every step; none at degree 1.
        reason: why it is not cut.
    """

    name: str
    kind: str
    role: Role
    style: Style | None = None
    parameters: tuple[ParameterPlan, ...] = ()
    leaves: int | None = None
    idle: tuple[int, ...] = ()
    collectives: tuple[Collective, ...] = ()
    reason: str = ""

    @property
    def is_cut(self) -> bool:
        """True unless every rank holds all of it."""
        return self.role != "whole"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "role": self.role,
            "style": style_dict(self.style),
            "leaves": self.leaves,
            "idle_ranks": list(self.idle),
            "reason": self.reason,
            "parameters": [parameter.as_dict() for parameter in self.parameters],
            "collectives": [collective.as_dict() for collective in self.collectives],
        }


@dataclass(frozen=True)
class Row:
    """Modules of repeated layers: their names differ in numbers only.

    Attributes:
        names: their names, abbreviated to one.
        modules: the modules.
    """

    names: str
    modules: tuple[ModulePlan, ...]

    @property
    def first(self) -> ModulePlan:
        """The first module, which is cut like all others."""
        return self.modules[0]


def rows(modules: Iterable[ModulePlan]) -> list[Row]:
    """One row for every kind of layer, in the order of the model."""
    named = {module.name: module for module in modules}
    groups = alike((name, _nameless(module)) for name, module in named.items())
    return [Row(together(names), tuple(named[name] for name in names)) for names in groups]


def style_dict(style: Style | str | None) -> dict[str, Any] | str | None:
    """A style as plain data, for JSON."""
    if style is None or isinstance(style, str):
        return style
    return {"style": type(style).__name__, **asdict(style)}


def held_bytes(modules: Iterable[ModulePlan], degree: int) -> tuple[int, ...]:
    """Bytes of parameters that each rank holds; tied ones once."""
    counted = [
        parameter.held_bytes
        for module in modules
        for parameter in module.parameters
        if not parameter.tied_to
    ]
    return tuple(sum(held[rank] for held in counted) for rank in range(degree))


def _nameless(module: ModulePlan) -> ModulePlan:
    tied = tuple(replace(each, tied_to=str(bool(each.tied_to))) for each in module.parameters)
    return replace(module, name="", parameters=tied)


@functools.lru_cache(1024)  # layers repeat
def _elements(layouts: tuple[Layout, ...]) -> tuple[tuple[int, int], ...]:
    """Number of elements that each rank holds and owns."""
    counts = []
    for each in layouts:
        counts.append((_numel(each.local_shape), _numel(each.owned_shape)))
    return tuple(counts)


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for length in shape:
        numel *= length
    return numel
