"""Numbers for the units of a family, and where a rank's run of them may begin."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardproof.watching.atoms import Labels, distinct


@dataclass(frozen=True)
class Box:
    """How labels lie in a tensor in which they vary along several dims.

    Attributes:
        roots: of the elements; (l1, l2, ...).
        is_split: whether they lay along one dim before, so that a rank has all elements that every
            rank holds; else it needs them only beside its own.
    """

    roots: Labels
    is_split: bool


@dataclass(frozen=True)
class Numbering:
    """Units of one family in their order, behind them the shared ones.

    Attributes:
        count: how many units.
        members: roots of units and of shared units, ascending.
        number: of every member.
        needers: units that need a shared unit, for each in order; of the last one all.
    """

    count: int
    members: Labels
    number: Labels
    needers: tuple[tuple[int, ...], ...]

    @property
    def whole(self) -> int:
        """The number of what every rank holds."""
        return self.count + len(self.needers) - 1

    @classmethod
    def of(
        cls, units: Labels, first: Labels, kinds: NDArray[np.uint64], pairs: Labels
    ) -> "Numbering":
        """Number units by where they are found first.

        Units of another kind than the most frequent one get the numbers of that one, spread
        evenly: heads and features that lie in one fused weight are cut together.

        Args:
            units: roots.
            first: where each is found first.
            kinds: equal for units that lie alike in all dims.
            pairs: (n, 2): unit and shared unit.
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
        numbered = [place.get(group, whole) for group in needed_by]
        members = np.concatenate([units, shared])
        number = np.concatenate([numbers, np.array(numbered, dtype=np.int64)])
        order = np.argsort(members, kind="stable")
        return cls(count, members[order], number[order], (*kinds_of_needers, everyone))

    def numbers(self, roots: Labels) -> Labels:
        """The number of every root; those of no member are held by all."""
        at = np.minimum(np.searchsorted(self.members, roots), len(self.members) - 1)
        return np.where(self.members[at] == roots, self.number[at], self.whole)

    def spans(self, roots: Labels) -> tuple[Labels, Labels]:
        """The first and the last unit that needs every root."""
        low = np.arange(self.count + len(self.needers))
        high = low.copy()
        for place, group in enumerate(self.needers):
            low[self.count + place], high[self.count + place] = group[0], group[-1]
        numbers = self.numbers(roots)
        return low[numbers], high[numbers]


def boundaries(numbering: Numbering, boxes: list[Box]) -> tuple[int, ...] | None:
    """Units at which a rank may begin so that all its elements are a run along one dim.

    Args:
        numbering: the units.
        boxes: tensors in which they vary along several dims.
    Returns:
        The units, 0 among them; None if there is no restriction.
    """
    allowed = np.ones(numbering.count, dtype=bool)
    for box in boxes:
        allowed &= _allowed(numbering, box)
    allowed[0] = True
    return None if allowed.all() else tuple(np.flatnonzero(allowed).tolist())


def _allowed(numbering: Numbering, box: Box) -> NDArray[np.bool_]:
    """By unit: whether what lies before it and what does not differ along one dim alone."""
    low, high = numbering.spans(box.roots)
    if not box.is_split:  # what every rank holds is taken where it is needed
        is_held = (low == 0) & (high == numbering.count - 1)
        low, high = np.where(is_held, -1, low), np.where(is_held, -1, high)
    crossed = []
    for dim in range(low.ndim):
        begins = _changes(high, dim, numbering.count)  # who has the unit or a later one
        ends = _changes(low, dim, numbering.count)  # who has an earlier one
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
    """By unit: whether neighbours along a dim lie on both sides of it."""
    size = values.shape[dim]
    left = np.take(values, np.arange(size - 1), axis=dim).ravel()
    right = np.take(values, np.arange(1, size), axis=dim).ravel()
    differ = (left != right) & (left >= 0) & (right >= 0)
    low, high = np.minimum(left, right)[differ], np.maximum(left, right)[differ]
    steps = _steps(low, high, count)
    return np.cumsum(steps)[:count] > 0


def _steps(low: Labels, high: Labels, count: int) -> Labels:
    """+1 behind every low, -1 behind every high."""
    up = np.bincount(low + 1, minlength=count + 2)[: count + 2]
    down = np.bincount(high + 1, minlength=count + 2)[: count + 2]
    return up - down
