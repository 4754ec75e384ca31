"""`Family`: dims of parameters that can only be cut together, found in a watched forward."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardproof.units import Block, Units, blocks_of
from shardproof.watching.atoms import Atoms, Labels, distinct
from shardproof.watching.boundaries import Box, Numbering, boundaries
from shardproof.watching.forward import Key, Watched
from shardproof.watching.needs import Needs, coarsen, settle_needs
from shardproof.watching.record import SeenOperation


@dataclass(frozen=True)
class Event:
    """An operation that needs communication if the family is cut.

    Attributes:
        what: "reduce", "sum", "gather", "weight", "lookup" or "output", as in `record.Seen`.
        op: the operation.
        module: name of the module that ran it.
        parameter: the parameter that it used along the cut dim, or None.
        dim: the dim of the parameter, if known.
    """

    what: str
    op: str
    module: str
    parameter: str | None
    dim: int | None = None


@dataclass(frozen=True)
class Family:
    """Dims of parameters that are cut together or not at all.

    Attributes:
        name: its first parameter and dim.
        units: the units that can be cut apart, in the order of their indices; at least one.
        dims: the dims that are cut, with the unit of each index. A shared unit that every unit
            needs is held by all ranks.
        whole: dims of the family that are not cut, because every rank needs all of them.
        kind: "pair" (column then row, one all-reduce), "pair with sums" (small sums between),
            "vocabulary", "gathered" (a column whose output is gathered), "row" (a row whose input
            is whole: one all-reduce), or "" (it cannot be cut).
        events: operations that need communication if the family is cut.
        crosses: numbers of families that some activation has along another dim.
        has_matrix: whether one of its parameters has more than one dim.
    """

    name: str
    units: Units
    dims: Mapping[Key, tuple[Block, ...]]
    whole: tuple[Key, ...]
    kind: str
    events: tuple[Event, ...]
    crosses: frozenset[int] = frozenset()
    has_matrix: bool = True


def families(watched: Watched) -> tuple[Family, ...]:
    """All families of a watched forward, also those that cannot be cut.

    Each dim with more than one index, of each parameter, is in `dims` or `whole` of one family.
    """
    return _Finder(watched).find()


class _Finder:
    """Finds the families; its methods share arrays over all labels."""

    def __init__(self, watched: Watched) -> None:
        self.watched, self.record = watched, watched.record
        atoms = self.record.atoms
        self.needs: Needs = settle_needs(self.record)
        dims = [distinct(atoms.roots(labels)) for labels in watched.labels.values()]
        if coarsen(self.record, dims, self.needs):
            self.needs = settle_needs(self.record)
        self.roots = {key: atoms.roots(labels) for key, labels in watched.labels.items()}
        self.unique = {key: distinct(roots) for key, roots in self.roots.items()}
        self.group = Atoms()  # joins units that lie in one dim of some parameter
        self.group.fresh(len(atoms))

    def find(self) -> tuple[Family, ...]:
        """All families."""
        homes = self._homes()
        members: dict[int, list[Key]] = {}
        for key, unit in homes.items():
            root = int(self.group.roots(np.array([unit]))[0])
            members.setdefault(root, []).append(key)
        number_of = {root: number for number, root in enumerate(members)}
        self.family_of = np.full(len(self.group), -1, dtype=np.int64)
        self.family_of[list(number_of)] = list(number_of.values())
        self.needer_family = np.full(len(self.group), -1, dtype=np.int64)
        needers, shared = self.needs.pairs.T
        self.needer_family[shared] = self.family_of[self.group.roots(needers)]
        events = self._events(len(members))
        boxes = self._boxes(len(members))
        crosses = self._crosses(len(members))
        return tuple(
            self._family(number, keys, events[number], boxes[number], crosses[number])
            for number, keys in enumerate(members.values())
        )

    def _number(self, labels: Labels, *, shared: bool = False) -> Labels:
        """The distinct families of labels; with `shared`, a shared unit counts for its needers."""
        units = distinct(self.record.atoms.roots(labels))
        numbers = self.family_of[self.group.roots(units)]
        if shared:
            numbers = np.where(numbers < 0, self.needer_family[units], numbers)
        numbers = distinct(numbers)
        return numbers[numbers >= 0]

    def _drivers(self, units: Labels) -> Labels:
        return units[~self.needs.is_needed[units] & ~self.needs.is_whole[units]]

    def _homes(self) -> dict[Key, int]:
        """For each dim a unit of its family; the units of a family are joined in `group`."""
        homes: dict[Key, int] = {}
        for key, units in self.unique.items():
            drivers = self._drivers(units)
            if len(drivers):
                self._group_all(drivers)
                homes[key] = int(drivers[0])
        order = np.argsort(self.needs.pairs[:, 1], kind="stable")
        pairs = self.needs.pairs[order]
        for key, units in self.unique.items():
            if key not in homes:
                homes[key] = self._follow(units, pairs)
        return {key: homes[key] for key in self.unique}

    def _group_all(self, units: Labels) -> None:
        self.group.join(units, np.full_like(units, units[0]))

    def _follow(self, units: Labels, pairs: Labels) -> int:
        """A unit that needs the units of a dim which has only shared or whole units."""
        whole = self.needs.is_whole
        live = units[~whole[units]]
        successors = pairs[np.isin(pairs[:, 1], live), 0]
        successors = successors[~whole[successors] & ~self.needs.is_needed[successors]]
        if not len(
            successors
        ):  # norms across heads: the needed units and their needers are summed over
            successors = pairs[np.isin(pairs[:, 1], units), 0]
            successors = successors[whole[successors]]
        if len(successors):
            return int(successors[0])
        self._group_all(units)
        return int(units[0])

    def _events(self, count: int) -> list[list[SeenOperation]]:
        """The recorded operations of each family."""
        events: list[list[SeenOperation]] = [[] for _ in range(count)]
        numbers_by_atoms: dict[int, Labels] = {}
        for operation in self.record.operations:
            if id(operation.atoms) not in numbers_by_atoms:
                numbers_by_atoms[id(operation.atoms)] = self._number(operation.atoms, shared=True)
            for number in numbers_by_atoms[id(operation.atoms)].tolist():
                events[number].append(operation)
        return events

    def _boxes(self, count: int) -> list[list[Box]]:
        """The boxes of each family."""
        boxes: list[list[Box]] = [[] for _ in range(count)]
        for (_, is_split, _), labels in self.record.boxes.items():
            box = Box(self.record.atoms.roots(labels), is_split)
            for number in self._number(box.roots).tolist():
                boxes[number].append(box)
        return boxes

    def _crosses(self, count: int) -> list[dict[int, tuple[str, str]]]:
        """For each family, the families along another dim of one activation, and the operation."""
        crosses: list[dict[int, tuple[str, str]]] = [{} for _ in range(count)]
        for left, right, op, module in self.record.crossings.values():
            for a in self._number(left).tolist():
                for b in self._number(right).tolist():
                    crosses[a].setdefault(b, (op, module))
                    crosses[b].setdefault(a, (op, module))
        return crosses

    def _family(
        self,
        number: int,
        keys: list[Key],
        operations: list[SeenOperation],
        boxes: list[Box],
        crosses: dict[int, tuple[str, str]],
    ) -> Family:
        mine = [self._mine(key, number) for key in keys]
        live = [units[~self.needs.is_whole[units]] for units in mine]
        total = len(distinct(np.concatenate(live)))
        is_live = total >= 2
        numbering = self._numbering(keys, live if is_live else mine)
        events = [e for e in operations if not is_live or e.what not in ("gather", "sum", "weight")]
        dims, whole = self._dims(keys, numbering)
        for key in _second_dims(dims, events):
            del dims[key]  # its output is whole, and is sliced where it meets a cut operand
            whole.append(key)
        name = f"{keys[0][0]}.{keys[0][1]}"
        breaks = boundaries(numbering, boxes)
        unique_events = {Event(e.what, e.op, e.module, e.parameter, e.dim): None for e in events}
        if number in crosses:
            op, module = crosses[number]
            unique_events[Event("gather", f"{op} (cut along two dims)", module, None)] = None
        is_held = any(
            b.first + b.size // b.unit > numbering.whole for d in dims.values() for b in d
        )
        needers = numbering.needers if is_held else numbering.needers[:-1]
        units = Units(name, numbering.count, needers, breaks)
        shapes = self.watched.shapes
        family = Family(
            name,
            units,
            dims,
            tuple(whole),
            "",
            tuple(unique_events),
            frozenset(crosses) - {number},
            any(len(shapes[parameter]) > 1 for parameter, _ in keys),
        )
        return replace(family, kind=kind_of_family(family, shapes, self.record.used))

    def _dims(
        self, keys: list[Key], numbering: Numbering
    ) -> tuple[dict[Key, tuple[Block, ...]], list[Key]]:
        """The dims that are cut, and the dims that every unit needs whole."""
        dims: dict[Key, tuple[Block, ...]] = {}
        whole: list[Key] = []
        for key in keys:
            numbers = numbering.numbers(self.roots[key])
            if (numbers == numbering.whole).all():
                whole.append(key)
            else:
                dims[key] = blocks_of(numbers)
        return dims, whole

    def _mine(self, key: Key, number: int) -> Labels:
        """The units of a dim that belong to the family and are not shared."""
        units = self.unique[key]
        units = units[~self.needs.is_needed[units]]
        return units[self.family_of[self.group.roots(units)] == number]

    def _numbering(self, keys: list[Key], units: list[Labels]) -> Numbering:
        """Number the units; different kinds of units in one dim are cut together."""
        members = distinct(np.concatenate(units))
        if not len(members):  # nothing but shared units
            members = distinct(np.concatenate([self.unique[key] for key in keys]))[:1]
        first = np.full(len(members), np.iinfo(np.int64).max)
        kinds = np.zeros(len(members), dtype=np.uint64)
        offset = 0
        for place, key in enumerate(keys):
            roots, where, counts = np.unique(self.roots[key], return_index=True, return_counts=True)
            at = np.searchsorted(members, roots)
            ours = (at < len(members)) & (members[np.minimum(at, len(members) - 1)] == roots)
            at = at[ours]
            first[at] = np.minimum(first[at], where[ours] + offset)
            kinds[at] += (counts[ours].astype(np.uint64) + np.uint64(1)) * np.uint64(
                pow(1000003, place + 1, 1 << 64)
            )
            offset += len(self.roots[key])
        return Numbering.of(members, first, kinds, self.needs.pairs)


def _second_dims(dims: Mapping[Key, object], events: list[SeenOperation]) -> list[Key]:
    """For parameters with several dims in one family, all dims but the first contracted one."""
    rows = {(event.parameter, event.dim) for event in events if event.what == "reduce"}
    second: list[Key] = []
    for name in dict.fromkeys(name for name, _ in dims):
        mine = [key for key in dims if key[0] == name]
        if len(mine) > 1:
            best = next((key for key in mine if key in rows), mine[0])
            second += [key for key in mine if key != best]
    return second


def kind_of_family(
    family: Family, shapes: Mapping[str, tuple[int, ...]], used: Collection[str]
) -> str:
    """The kind of a family, by the communication that a cut needs: see `Family.kind`."""
    matrices = {name for name, _ in family.dims if len(shapes[name]) > 1 and name in used}
    rows = {e.parameter for e in family.events if e.what == "reduce" and e.parameter in matrices}
    columns = matrices - rows
    count = {
        what: len({(e.op, e.module) for e in family.events if e.what == what})
        for what in ("gather", "sum", "lookup")
    }
    if family.units.count < 2 or not matrices or family.units.breaks == (0,):
        return ""
    if any(event.what == "weight" for event in family.events):
        return ""  # a weight is never gathered
    if rows and columns and not count["gather"]:
        if not count["sum"]:
            return "pair"
        if count["sum"] <= 3 * len(rows):
            return "pair with sums"
    if count["lookup"] and not rows and count["gather"] <= 2:
        return "vocabulary"
    if columns and not rows and count["gather"] + count["sum"] <= 1:
        return "gathered"
    if rows and not columns and not count["gather"] and not count["sum"]:
        return "row"
    return ""
