"""Units that are cut together, their owners, and the units of the indices of a dim.

A *unit* is never cut: a feature of a feed-forward, a query head with its rows of a fused weight, a
row of the vocabulary. Units of one kind have an order, and ranks own contiguous runs of their
leaves, as in `leaves.py`. A *shared unit* is needed by several units, like the key-value head of a
group of query heads. Every rank that owns one of these units holds it; the rank of the first one
owns it.

Integers only: no torch, no ranks. Results are cached, because every operation uses them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shardproof.errors import ShapeError
from shardproof.leaves import Cut, share

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """The units of a plan, at any degree.

    Attributes:
        name: name for messages and the ledger.
        count: number of units.
        needers: for each shared unit the units that need it, in order; shared unit `k` has the
            number `count + k`.
        breaks: the units at which a rank's run may begin, if a view of the model allows no
            others; None for all.
    """

    name: str
    count: int
    needers: tuple[tuple[int, ...], ...] = ()
    breaks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ShapeError(f"{self.name!r} has {self.count} units: there must be at least one.")
        for needers in self.needers:
            if list(needers) != sorted(set(needers)) or not set(needers) <= set(range(self.count)):
                raise ShapeError(
                    f"{self.name!r}: a shared unit is needed by {needers}, which are not some of "
                    f"{self.count} units in order."
                )


@dataclass(frozen=True)
class Shared:
    """Units shared among the ranks of one degree.

    Attributes:
        units: the units.
        leaves: number of leaves of the plan.
        degree: number of ranks.
    """

    units: Units
    leaves: int
    degree: int

    @cached_property
    def cut(self) -> Cut:
        """The cut of the units, whose leaves are those of every sum over them."""
        plain = Cut(self.units.count, self.leaves, self.degree)
        if self.units.breaks is None:
            return plain
        return Cut(self.units.count, self.leaves, self.degree, runs=self._snapped(plain))

    def _snapped(self, plain: Cut) -> tuple[range, ...]:
        """Runs of leaves that begin at allowed units only, each at the nearest one."""
        allowed = {*(self.units.breaks or ()), 0}
        starts = [leaf for leaf in range(plain.num_leaves) if plain.leaf(leaf).start in allowed] + [
            plain.num_leaves
        ]
        bounds = [0]
        for rank in range(1, self.degree):
            target = share(plain.num_leaves, self.degree)[rank].start
            nearest = min(starts, key=lambda start, at=target: (abs(start - at), start))  # type: ignore[misc]
            bounds.append(max(nearest, bounds[-1]))
        bounds.append(plain.num_leaves)
        return tuple(range(start, stop) for start, stop in pairwise(bounds))

    def owned(self, rank: int) -> range:
        """Units that a rank owns."""
        return self.cut.owned(rank)

    @cached_property
    def leaf_of(self) -> tuple[int, ...]:
        """The leaf of each unit, then of each shared unit (the leaf of its first needer)."""
        leaves = [leaf for leaf in range(self.cut.num_leaves) for _ in self.cut.leaf(leaf)]
        return (*leaves, *(leaves[needers[0]] for needers in self.units.needers))

    @cached_property
    def owner_of(self) -> tuple[int, ...]:
        """The owner of each unit, then of each shared unit."""
        ranks = {leaf: rank for rank in range(self.degree) for leaf in self.cut.run(rank)}
        return tuple(ranks[leaf] for leaf in self.leaf_of)

    def holds(self, rank: int) -> frozenset[int]:
        """Numbers of the units that a rank holds, shared ones among them."""
        return self._held[rank]

    @cached_property
    def _held(self) -> tuple[frozenset[int], ...]:
        count = self.units.count
        return tuple(
            frozenset(self.owned(rank))
            | {
                count + number
                for number, needers in enumerate(self.units.needers)
                if any(needer in self.owned(rank) for needer in needers)
            }
            for rank in range(self.degree)
        )

    @property
    def is_whole(self) -> bool:
        """Whether one rank owns every unit."""
        return any(len(self.owned(rank)) == self.units.count for rank in range(self.degree))


@dataclass(frozen=True)
class Block:
    """A run of indices with consecutive units.

    Attributes:
        size: number of indices.
        first: the unit of the first index.
        unit: number of indices of each unit.
    """

    size: int
    first: int
    unit: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.unit < 1 or self.size % self.unit or self.first < 0:
            raise ShapeError(f"{self} is no run of whole units.")


def blocks_of(labels: Sequence[int] | Indices) -> tuple[Block, ...]:
    """The fewest blocks that describe a dim, from the unit of each of its indices.

    >>> blocks_of([0, 0, 1, 1, 0, 1])
    (Block(size=4, first=0, unit=2), Block(size=2, first=0, unit=1))
    """
    array = np.asarray(labels, dtype=np.int64)
    if not len(array):
        return ()
    starts = np.flatnonzero(np.diff(array, prepend=array[0] - 1))
    lengths = np.diff(starts, append=len(array))
    labels = array[starts]
    goes_on = (np.diff(labels) == 1) & (np.diff(lengths) == 0)
    heads = np.concatenate([[0], np.flatnonzero(~goes_on) + 1])
    runs = np.diff(heads, append=len(labels))  # a dim may have 100,000 units
    runs_of_labels = (labels[heads], lengths[heads], runs)
    return tuple(
        Block(run * length, label, length)
        for label, length, run in zip(*(each.tolist() for each in runs_of_labels), strict=True)
    )


@dataclass(frozen=True)
class CutDim:
    """How one dim of a tensor is cut: the unit of each index, and the ranks of the units.

    Attributes:
        shared: the units and their ranks.
        blocks: the units of the indices, in order.
    """

    shared: Shared
    blocks: tuple[Block, ...]

    @classmethod
    def of_labels(cls, shared: Shared, labels: Sequence[int] | Indices) -> "CutDim":
        """Make a cut from the unit of each index."""
        return cls(shared, blocks_of(labels))

    @cached_property
    def size(self) -> int:
        """Number of indices, on all ranks together."""
        return sum(block.size for block in self.blocks)

    @cached_property
    def labels(self) -> Indices:
        """The unit of every index."""
        runs = [
            block.first + np.arange(block.size, dtype=np.int64) // block.unit
            for block in self.blocks
        ]
        return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)

    def held(self, rank: int) -> Indices:
        """Indices that a rank holds, in order."""
        return self._held[rank]

    @cached_property
    def _held(self) -> tuple[Indices, ...]:
        return tuple(self._where(self.shared.holds(rank)) for rank in range(self.shared.degree))

    def _where(self, units: frozenset[int]) -> Indices:
        count = self.shared.units.count + len(self.shared.units.needers)
        is_needed = np.zeros(count, dtype=bool)
        is_needed[list(units)] = True
        return np.flatnonzero(is_needed[self.labels])

    def owned(self, rank: int) -> Indices:
        """Indices that a rank owns, in order: every index has one owner."""
        return self._owned[rank]

    @cached_property
    def _owned(self) -> tuple[Indices, ...]:
        owners = np.asarray(self.shared.owner_of, dtype=np.int64)[self.labels]
        return tuple(np.flatnonzero(owners == rank) for rank in range(self.shared.degree))

    def owned_places(self, rank: int) -> tuple[slice, ...]:
        """The positions of owned indices among the held ones of a rank, as runs."""
        return self._owned_places[rank]

    @cached_property
    def _owned_places(self) -> tuple[tuple[slice, ...], ...]:
        pairs = zip(self._held, self._owned, strict=True)
        return tuple(
            slices_of(np.flatnonzero(np.isin(held, owned, assume_unique=True)))
            for held, owned in pairs
        )

    def leaf_slices(self, rank: int) -> tuple[tuple[slice, ...], ...]:
        """For each leaf that a rank owns, the positions of its indices among the held ones.

        Two runs of the whole dim that are adjacent in the rank's part are one slice here, but only
        at some degrees. So collect a leaf (`runs.take`) before anything is added. To add run by
        run, use `ops.unit_split.UnitSplit.pieces`.
        """
        return self._leaf_slices[rank]

    @cached_property
    def _leaf_slices(self) -> tuple[tuple[tuple[slice, ...], ...], ...]:
        leaves = np.asarray(self.shared.leaf_of, dtype=np.int64)[self.labels]
        return tuple(
            tuple(
                slices_of(np.flatnonzero(leaves[self._held[rank]] == leaf))
                for leaf in self.shared.cut.run(rank)
            )
            for rank in range(self.shared.degree)
        )


def slices_of(indices: Indices) -> tuple[slice, ...]:
    """Ascending indices as slices.

    >>> slices_of(np.array([0, 1, 2, 5, 6]))
    (slice(0, 3, None), slice(5, 7, None))
    """
    if not len(indices):
        return ()
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return tuple(slice(int(run[0]), int(run[-1]) + 1) for run in np.split(indices, breaks))


def common_runs(places: Indices, parts: Indices) -> Iterator[tuple[slice, slice]]:
    """Split runs so that each lies in one run of `places` and one of `parts`."""
    apart = (np.diff(places) != 1) | (np.diff(parts) != 1)
    edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(places)]
    for start, stop in pairwise(edges):
        yield (
            slice(int(places[start]), int(places[stop - 1]) + 1),
            slice(int(parts[start]), int(parts[stop - 1]) + 1),
        )
