"""`choose`: which families are cut, and why the other parameters stay whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType

from shardproof.units import Block, Units
from shardproof.watching.family import Event, Family, kind_of_family
from shardproof.watching.forward import Watched

ORDER = ("pair", "pair with sums", "vocabulary", "gathered")
SMALL = 0.02  # a matrix with a smaller share of all weights is not worth a collective of its own
ALONE = ("vocabulary", "gathered")  # kinds with one matrix and a collective of its own
ENOUGH = 0.9  # if a smaller share of the matrices is cut, more are cut alone


@dataclass(frozen=True)
class Choice:
    """The families that are cut.

    Attributes:
        families: the cut families, in the order of the model.
        whole: name of each parameter that stays whole -> a sentence that says why.
        share: fraction of the weights of matrices that is cut.
    """

    families: tuple[Family, ...]
    whole: Mapping[str, str]
    share: float


def choose(
    all_families: Sequence[Family],
    watched: Watched,
    *,
    whole_weights: Mapping[str, str] = MappingProxyType({}),
    enough: float = ENOUGH,
) -> Choice:
    """Choose the families to cut, first those that send least; no parameter along two dims.

    Args:
        all_families: of the forward.
        watched: the forward.
        whole_weights: name of a weight that must stay whole -> the operation that needs all of it.
        enough: fraction of the matrices' weights that should be cut; if less is cut, single
            matrices are cut by rows, each with an all-reduce of its own.
    """
    shapes = watched.shapes
    all_families = (
        [_without(family, whole_weights, watched) for family in all_families]
        if whole_weights
        else all_families
    )
    cut_names: set[str] = set()
    chosen: set[int] = set()
    small: set[int] = set()
    for kind in ORDER:
        ours = [number for number, family in enumerate(all_families) if family.kind == kind]
        for number in sorted(ours, key=lambda n: _worth(all_families[n], shapes), reverse=True):
            family = all_families[number]
            names = {name for name, _ in family.dims}
            if kind in ALONE and _is_small(family, cut_names, shapes):
                small.add(number)
                continue
            if names & cut_names or family.crosses & chosen:
                continue
            chosen.add(number)
            cut_names |= names
    alone = _alone(all_families, cut_names, watched, enough)
    cut_names |= {name for family in alone for name, _ in family.dims}
    cut = sum(prod(shapes[name]) for name in cut_names if len(shapes[name]) > 1)
    matrices = sum(prod(shape) for shape in shapes.values() if len(shape) > 1)
    why = _Why(all_families, chosen, small, cut_names, watched)
    whole = {name: why.sentence(name) for name in shapes if name not in cut_names}
    whole |= {
        name: f"{operation!r} needs all of it at once." for name, operation in whole_weights.items()
    }
    families = (*(all_families[n] for n in sorted(chosen)), *alone)
    return Choice(families, whole, cut / max(matrices, 1))


def _without(family: Family, whole_weights: Mapping[str, str], watched: Watched) -> Family:
    """The same family, with the weights of `whole_weights` left whole."""
    left = {key: blocks for key, blocks in family.dims.items() if key[0] not in whole_weights}
    whole = (*family.whole, *(key for key in family.dims if key not in left))
    events = tuple(event for event in family.events if event.parameter not in whole_weights)
    reduced = replace(family, dims=left, whole=whole, events=events)
    return replace(reduced, kind=kind_of_family(reduced, watched.shapes, watched.record.used))


def _alone(
    all_families: Sequence[Family], cut_names: set[str], watched: Watched, enough: float
) -> list[Family]:
    """Matrices that are cut alone by rows, each with an all-reduce of its own, largest first.

    They are chosen only if too few weights are cut. The input is whole, so any cut is possible.
    """
    shapes = watched.shapes
    sizes = {name: prod(shape) for name, shape in shapes.items() if len(shape) > 1}
    missing = enough * sum(sizes.values()) - sum(sizes[name] for name in cut_names & set(sizes))
    rows: dict[str, tuple[Event, ...]] = {}
    for family in all_families:
        for event in family.events:
            if event.what == "reduce" and event.dim is not None and event.parameter in sizes:
                rows[event.parameter] = (*rows.get(event.parameter, ()), event)
    chosen: list[Family] = []
    for name in sorted(set(rows) - cut_names, key=lambda name: (-sizes[name], name)):
        dims = {event.dim for event in rows[name]}
        if missing <= 0 or len(dims) > 1:
            continue
        missing -= sizes[name]
        chosen.append(_row(name, dims.pop() or 0, rows[name], shapes[name]))
    return chosen


def _row(name: str, dim: int, events: tuple[Event, ...], shape: tuple[int, ...]) -> Family:
    size = shape[dim]
    units = Units(f"{name}.{dim}", size)
    events = tuple(dict.fromkeys(events))
    return Family(units.name, units, {(name, dim): (Block(size, 0, 1),)}, (), "row", events)


def _weight(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(prod(shapes[name]) for name in {name for name, _ in family.dims})


def _worth(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, int]:
    """Sort key: number of cut matrices per collective, then number of weights."""
    sent = len(
        {
            (event.op, event.module, event.parameter)
            for event in family.events
            if event.what != "output"
        }
    )
    matrices = len({name for name, _ in family.dims if len(shapes[name]) > 1})
    return matrices / max(sent, 1), _weight(family, shapes)


def _is_small(family: Family, cut_names: set[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a family is too small to be worth a collective of its own."""
    weight = _weight(family, shapes)
    largest = max((prod(shapes[name]) for name in cut_names), default=0)
    return weight < SMALL * sum(prod(shape) for shape in shapes.values()) and weight < largest


@dataclass(frozen=True)
class _Why:
    """Finds out why parameters stay whole.

    Attributes:
        all_families: that the forward has.
        chosen: numbers of the families that are cut.
        small: numbers of the families that are not worth a collective.
        cut_names: parameters that are cut.
        watched: the forward.
    """

    all_families: Sequence[Family]
    chosen: set[int]
    small: set[int]
    cut_names: set[str]
    watched: Watched

    def sentence(self, name: str) -> str:
        """Why a parameter stays whole, in one sentence."""
        if name not in self.watched.record.used:
            return "It is never used in the watched forward."
        reasons: dict[str, list[int]] = {}
        for number, family in enumerate(self.all_families):
            for key in (*family.dims, *family.whole):
                if key[0] == name:
                    reasons.setdefault(self._reason(name, number), []).append(key[1])
        if not reasons:
            return "It has one element along each dim."
        parts = [*reasons]
        if len(reasons) > 1:
            parts = [f"along dim {dims[0]} {reason}" for reason, dims in reasons.items()]
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}."

    def _reason(self, name: str, number: int) -> str:
        """Why one dim of a parameter is not cut."""
        family = self.all_families[number]
        if number in self.chosen:
            return f"every unit of {family.name!r} needs all of it"
        small = "it is too small to be worth a collective of its own"
        if number in self.small and family.kind == "vocabulary":
            return small
        event = _blocking(family, name)
        if event is not None:
            reason = "adds up over it" if event.what == "sum" else "needs it whole"
            return f"{_event_text(event)} {reason}"
        if family.units.count < 2:
            return "all of it belongs to one unit"
        if family.units.breaks == (0,):
            return "a view in the forward mixes its units"
        if not family.has_matrix:
            return "no operation joins it with a matrix that could be cut"
        rivals = family.crosses & self.chosen
        if rivals:
            return f"an activation that has it is cut as {self.all_families[min(rivals)].name!r}"
        if number in self.small:
            return small
        others = [other for other, _ in family.dims if other in self.cut_names and other != name]
        if others:
            return f"it would be cut with {others[0]!r}, which is cut along another dim"
        return "a cut of it alone would need an all-reduce of its own"


def _blocking(family: Family, name: str) -> Event | None:
    """The operation that needs a dim whole, preferably one in the parameter's own module."""
    events = [event for event in family.events if event.what in ("gather", "sum", "weight")]
    own = [event for event in events if event.module == name.rpartition(".")[0]]
    return next(iter([*own, *events]), None)


def _event_text(event: Event) -> str:
    return f"{event.op!r} in {event.module!r}" if event.module else f"{event.op!r}"
