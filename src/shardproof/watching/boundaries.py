"""Number the units of a family, and find the units at which a rank's run may begin."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardproof.watching.atoms import Labels, distinct


@dataclass(frozen=True)
class Box:
    """The labels of a tensor in which they vary along several dims.

    Attributes:
        roots: (l1, l2, ...), the roots of the elements.
        is_split: whether the labels varied along one dim before a view split it. Then a rank has
            all elements that every rank holds; otherwise it needs them only beside its own.
    """

    roots: Labels
    is_split: bool


@dataclass(frozen=True)
class Numbering:
    """Numbers of the units of one family, followed by those of its shared units.

    Attributes:
        count: number of units.
        members: roots of units and of shared units, ascending.
        number: the number of each member.
        needers: for each shared unit the units that need it; all units for the last one.
    """

    count: int
    members: Labels
    number: Labels
    needers: tuple[tuple[int, ...], ...]

    @property
    def whole(self) -> int:
        """The number that stands for everything that every rank holds."""
        return self.count + len(self.needers) - 1

    @classmethod
    def of(
        cls, units: Labels, first: Labels, kinds: NDArray[np.uint64], pairs: Labels
    ) -> "Numbering":
        """Number units in the order of their first occurrence.

        Units of other kinds than the most frequent one are mapped evenly to its numbers: heads and
        features that lie in one fused weight are cut together.

        Args:
            units: roots.
            first: position of the first occurrence of each unit.
            kinds: equal for units that occur equally often in each dim.
            pairs: (n, 2), unit and shared unit.
        """
        _, kind, counts = np.unique(kinds, return_inverse=True, return_counts=True)
        order = np.argsort(first, kind="stable")
        lead = kind[order[np.argmax(counts[kind[order]])]]
        count = int(counts[lead])
        numbers = np.zeros(len(units), dtype=np.int64)
        for each in range(len(counts)):
            ours = order[kind[order] == each]
            numbers[ours] = np.arange(len(ours)) * count // len(ours)
        chosen = np.isin(pairs[:, 0], units) & ~np.isin(pairs[:, 1], units)
        pairs = pairs[chosen]
        needer = numbers[np.searchsorted(units, pairs[:, 0])]
        order = np.lexsort((needer, pairs[:, 1]))
        shared, starts = np.unique(pairs[order, 1], return_index=True)
        groups = np.split(needer[order], starts[1:]) if len(shared) else []
        needed_by = [tuple(distinct(group).tolist()) for group in groups]
        everyone = tuple(range(count))
        kinds_of_needers = sorted({group for group in needed_by if len(group) < count})
        place = {group: count + at for at, group in enumerate(kinds_of_needers)}
        whole = count + len(kinds_of_needers)
        group_numbers = [place.get(group, whole) for group in needed_by]
        members = np.concatenate([units, shared])
        number = np.concatenate([numbers, np.array(group_numbers, dtype=np.int64)])
        order = np.argsort(members, kind="stable")
        return cls(count, members[order], number[order], (*kinds_of_needers, everyone))

    def numbers(self, roots: Labels) -> Labels:
        """The number of each root; roots that are no members are held by all ranks."""
        at = np.minimum(np.searchsorted(self.members, roots), len(self.members) - 1)
        return np.where(self.members[at] == roots, self.number[at], self.whole)

    def spans(self, roots: Labels) -> tuple[Labels, Labels]:
        """For each root, the first and the last unit that needs it."""
        low = np.arange(self.count + len(self.needers))
        high = low.copy()
        for place, group in enumerate(self.needers):
            low[self.count + place], high[self.count + place] = group[0], group[-1]
        numbers = self.numbers(roots)
        return low[numbers], high[numbers]


def boundaries(numbering: Numbering, boxes: list[Box]) -> tuple[int, ...] | None:
    """Units at which a rank may begin, so that its elements are one run along one dim.

    Args:
        numbering: the units.
        boxes: tensors in which the units vary along several dims.
    Returns:
        The units, with 0; None if there is no restriction.
    """
    allowed = np.ones(numbering.count, dtype=bool)
    for box in boxes:
        allowed &= _allowed(numbering, box)
    allowed[0] = True
    return None if allowed.all() else tuple(np.flatnonzero(allowed).tolist())


def _allowed(numbering: Numbering, box: Box) -> NDArray[np.bool_]:
    """By unit: whether a boundary before it separates the elements along one dim only."""
    low, high = numbering.spans(box.roots)
    if not box.is_split:  # elements that every rank holds do not restrict the boundaries
        is_held = (low == 0) & (high == numbering.count - 1)
        low, high = np.where(is_held, -1, low), np.where(is_held, -1, high)
    crossed = []
    for dim in range(low.ndim):
        begins = _changes(high, dim, numbering.count)  # elements of this unit or a later one
        ends = _changes(low, dim, numbering.count)  # elements of an earlier unit
        crossed.append(begins | ends)
    several = np.sum(crossed, axis=0) > 1
    alone = [dim & ~several for dim in crossed]
    best = int(np.argmax([each.sum() for each in alone]))
    wrong = several.copy()
    for dim, each in enumerate(alone):
        if dim != best:
            wrong |= each
    return ~wrong


def _changes(values: Labels, dim: int, count: int) -> NDArray[np.bool_]:
    """By unit: whether neighbouring elements along a dim lie on both sides of the boundary."""
    size = values.shape[dim]
    left = np.take(values, np.arange(size - 1), axis=dim).ravel()
    right = np.take(values, np.arange(1, size), axis=dim).ravel()
    differ = (left != right) & (left >= 0) & (right >= 0)
    low, high = np.minimum(left, right)[differ], np.maximum(left, right)[differ]
    steps = _steps(low, high, count)
    return np.cumsum(steps)[:count] > 0


def _steps(low: Labels, high: Labels, count: int) -> Labels:
    """Count +1 after each low and -1 after each high, for a cumulative sum."""
    up = np.bincount(low + 1, minlength=count + 2)[: count + 2]
    down = np.bincount(high + 1, minlength=count + 2)[: count + 2]
    return up - down
