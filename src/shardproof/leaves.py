"""`Cut` and `Layout`: how units form leaves, and which rank owns which leaves. Integers only.

A *unit* is never cut (a feature, a query head, a vocabulary row). A *leaf* is a run of units,
and is the unit of ownership and of summation. How many leaves a dim has is fixed by the plan and
never by the degree: that is what keeps the bits the same (`tree.py` says how).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from shardproof.checked_values import whole_number
from shardproof.errors import DegreeError, ShapeError
from shardproof.wording import short_repr

DEFAULT_LEAVES = 8


def share(size: int, parts: int) -> tuple[range, ...]:
    """Cut `range(size)` into `parts` contiguous runs whose lengths differ by at most one.

    The longer runs come first; runs are empty where there are more parts than items.

    >>> share(8, 3)
    (range(0, 3), range(3, 6), range(6, 8))
    """
    if parts < 1 or size < 0:
        raise ShapeError(
            f"cannot share {size} items among {parts} parts: there must be at least one part, "
            "and no negative number of items."
        )
    length, longer = divmod(size, parts)
    starts = [part * length + min(part, longer) for part in range(parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def checked_degree(degree: Any) -> int:
    """Convert the argument `degree` of a user to an int.

    Raises:
        DegreeError: it is not a whole number, or not positive.
    """
    number = whole_number(degree)
    if number is None:
        raise DegreeError(f"degree {short_repr(degree)} is not a whole number. Use 1 or more.")
    if number < 1:
        raise DegreeError(f"degree {short_repr(number)} is not a positive number. Use 1 or more.")
    return number


def check_degree(degree: int, leaves: int) -> None:
    """Raise unless `degree` ranks can share `leaves` leaves.

    Raises:
        DegreeError: the degree is not a positive number or exceeds the leaves.
    """
    if leaves < 1:
        raise DegreeError(
            f"leaves={short_repr(leaves)} is not a positive number. Use 1 or more (default 8)."
        )
    if degree < 1:
        raise DegreeError(f"degree {short_repr(degree)} is not a positive number. Use 1 or more.")
    if degree > leaves:
        raise DegreeError(
            f"degree {short_repr(degree)} exceeds leaves={leaves}: a rank beyond the last leaf "
            f"would never have work. Use leaves={short_repr(degree)} or more (at every degree, for "
            f"the leaves fix the bits), or a degree of at most {leaves}."
        )


@dataclass(frozen=True)
class OwnedLeaves:
    """The leaves that one rank owns of a cut dim, and where they lie in what the rank holds.

    Attributes:
        run: which leaves.
        num_leaves: of the whole dim.
        slices: where each of them lies.
        own: where all of them lie.
        is_all: whether the rank holds nothing else.
    """

    run: range
    num_leaves: int
    slices: tuple[slice, ...]
    own: slice
    is_all: bool


def check_batch_degree(degree: int, batch_leaves: int, *, where: str) -> None:
    """Raise unless `degree` ranks can share a batch of so many leaves.

    Args:
        degree: number of ranks that share a batch.
        batch_leaves: number of leaves of a batch.
        where: what has the ranks, for the message.

    Raises:
        DegreeError: there are more ranks than leaves.
    """
    if degree > batch_leaves:
        raise DegreeError(
            f"{where} has {degree} ranks, and a batch has {batch_leaves} leaves: a rank beyond the "
            f"last leaf would never have work. Use batch_leaves={degree} or more (in every layout, "
            f"for the leaves fix the bits), or at most {batch_leaves} ranks."
        )


@dataclass(frozen=True)
class Cut:
    """One dim of `size` units, cut into leaves that `degree` ranks share.

    Attributes:
        size: number of units along the dim, on all ranks together.
        leaves: number of leaves of the plan; a dim with fewer units has fewer leaves.
        degree: number of ranks that share the leaves; a rank may own none.
        unit: number of indices that are never cut apart (the features of one head); `size` and all
            ranges count indices.
        runs: the leaves of each rank, if `share` does not decide them: key-value heads follow the
            query heads, each as one leaf (`heads.py`); ranks begin only where a view of the model
            allows it (`units.py`). The number of leaves is then that of the runs.
    """

    size: int
    leaves: int
    degree: int
    unit: int = 1
    runs: tuple[range, ...] | None = None

    def __post_init__(self) -> None:
        check_degree(self.degree, self.leaves)
        size = self.size if type(self.size) is int else whole_number(self.size) or 0
        if size < 1:
            raise ShapeError(
                f"cannot cut a dim of {short_repr(self.size)} units: it needs at least one, as a "
                "whole number."
            )
        object.__setattr__(self, "size", size)
        if self.unit < 1 or self.size % self.unit:
            raise ShapeError(
                f"cannot cut a dim of {self.size} into units of {self.unit}: they do not fill it."
            )
        if self.runs is not None:
            self._check_runs(self.runs)

    def _check_runs(self, runs: tuple[range, ...]) -> None:
        """Raise unless every leaf is owned once, in rank order."""
        owned = [leaf for run in runs for leaf in run]
        if (
            len(runs) != self.degree
            or owned != list(range(self.num_leaves))
            or not 1 <= self.num_leaves <= self.size // self.unit
        ):
            raise ShapeError(
                f"runs={runs} do not give the {self.num_leaves} leaves to {self.degree} ranks, "
                "each leaf once and in rank order."
            )

    @property
    def num_leaves(self) -> int:
        """The actual number of leaves, which is at most the number of units."""
        if self.runs is not None:
            return sum(map(len, self.runs))
        return min(self.leaves, self.size // self.unit)

    def leaf(self, index: int) -> range:
        """Indices of one leaf."""
        return self._leaves()[index]

    def _leaves(self) -> tuple[range, ...]:
        shares = share(self.size // self.unit, self.num_leaves)
        return tuple(range(each.start * self.unit, each.stop * self.unit) for each in shares)

    def run(self, rank: int) -> range:
        """Leaves that `rank` owns; empty if there are fewer leaves than ranks.

        >>> Cut(size=64, leaves=8, degree=3).run(2)
        range(6, 8)
        """
        if not 0 <= rank < self.degree:
            raise ShapeError(f"rank {rank} is not one of the {self.degree} ranks of this cut.")
        if self.runs is not None:
            return self.runs[rank]
        return share(self.num_leaves, self.degree)[rank]

    def units(self, run: range) -> range:
        """Indices of a contiguous run of leaves."""
        if not run:
            return range(0)
        bounds = self._leaves()
        return range(bounds[run.start].start, bounds[run.stop - 1].stop)

    def owned(self, rank: int) -> range:
        """Indices that `rank` owns.

        >>> Cut(size=63, leaves=8, degree=2).owned(1)
        range(32, 63)
        """
        return self.units(self.run(rank))

    def sizes(self) -> tuple[int, ...]:
        """Number of indices that each rank owns, in rank order."""
        return tuple(len(self.owned(rank)) for rank in range(self.degree))

    def leaf_slices(self, rank: int, held: range | None = None) -> tuple[slice, ...]:
        """The slice of each owned leaf of `rank` in the part that it holds.

        Args:
            rank: the rank.
            held: the leaves that it holds; by default those that it owns.
        """
        run = self.run(rank)
        start = self.units(run if held is None else held).start
        return tuple(
            slice(units.start - start, units.stop - start)
            for units in self._leaves()[run.start : run.stop]
        )

    def owned_leaves(self, rank: int, held: range | None = None) -> OwnedLeaves:
        """The leaves that `rank` owns.

        Args:
            rank: whose.
            held: the leaves that it holds; those it owns, if not given.
        """
        run, slices = self.run(rank), self.leaf_slices(rank, held)
        own = slice(slices[0].start, slices[-1].stop) if slices else slice(0, 0)
        return OwnedLeaves(run, self.num_leaves, slices, own, held is None or held == run)

    def idle_ranks(self) -> tuple[int, ...]:
        """Ranks that own no leaf; they hold an empty shard and still take part in collectives."""
        return tuple(rank for rank in range(self.degree) if not self.run(rank))


Index = tuple[slice, ...]


class HeldLeaf(NamedTuple):
    """A leaf of which a rank holds all or some indices.

    Attributes:
        leaf: its number.
        shape: shape of the whole leaf, with its runs of indices one after the other.
        pieces: for each run its slice in the shard, and its slice in the leaf.
    """

    leaf: int
    shape: tuple[int, ...]
    pieces: tuple[tuple[Index, Index], ...]


@dataclass(frozen=True)
class Layout:
    """The layout of one tensor on one rank of an axis.

    In a `Layout` a rank's part is one run of indices; in a `BlockLayout` (`block_layout.py`) it is
    several. Code for both uses `owned_runs`, `held_runs`, `leaf_places`, `owned_places`,
    `other_places`, `held_leaves` and `copies`.

    Attributes:
        shape: the global shape.
        rank: the rank.
        dim: the dim that is cut, or None if every rank holds the whole tensor (Replicate).
        cut: how that dim is cut; None exactly when `dim` is.
        held: leaves that the rank holds; more than it owns only if leaves are replicated.
    """

    shape: tuple[int, ...]
    rank: int
    dim: int | None = None
    cut: Cut | None = None
    held: range | None = None

    def __post_init__(self) -> None:
        if (self.dim is None) != (self.cut is None):
            raise ShapeError(f"a layout has both dim and cut or neither, got {self!r}.")
        if self.cut is not None and self.dim is not None:
            if not 0 <= self.dim < len(self.shape):
                raise ShapeError(
                    f"dim {self.dim} is not one of the {len(self.shape)} dims of shape "
                    f"{self.shape}; count from the left."
                )
            if self.cut.size != self.shape[self.dim]:
                raise ShapeError(
                    f"dim {self.dim} of shape {self.shape} has {self.shape[self.dim]} units, "
                    f"its cut {self.cut.size}."
                )
            if self.held is None:
                object.__setattr__(self, "held", self.cut.run(self.rank))

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole tensor."""
        return self.dim is None

    @property
    def owned(self) -> range:
        """Global indices along `dim` that this rank owns (of dim 0 if replicated)."""
        if self.cut is None:
            return range(self.shape[0] if self.shape else 0)
        return self.cut.owned(self.rank)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part that this rank holds."""
        return self._shape_with(self.held_runs)

    @property
    def owned_shape(self) -> tuple[int, ...]:
        """Shape of the part that this rank owns."""
        return self._shape_with(self.owned_runs)

    def _shape_with(self, runs: tuple[range, ...]) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        length = sum(map(len, runs))
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    @property
    def held_indices(self) -> range:
        """Global indices along `dim` that this rank holds (of dim 0 if replicated)."""
        if self.cut is None or self.held is None:
            return self.owned
        return self.cut.units(self.held)

    @property
    def owned_runs(self) -> tuple[range, ...]:
        """`owned` as runs, in global order; none if the rank owns nothing."""
        owned = self.owned
        return (owned,) if owned else ()

    @property
    def held_runs(self) -> tuple[range, ...]:
        """`held_indices` as runs, in global order, in which the shard has them."""
        held = self.held_indices
        return (held,) if held else ()

    @property
    def leaf_places(self) -> tuple[tuple[slice, ...], ...]:
        """For each leaf that this rank owns, the positions of its runs in the shard."""
        if self.cut is None:
            return ()
        return tuple((where,) for where in self.cut.leaf_slices(self.rank, self.held))

    @property
    def owned_places(self) -> tuple[slice, ...]:
        """The positions in the shard of the indices that this rank owns, as runs along `dim`."""
        owned, start = self.owned, self.held_indices.start
        return (slice(owned.start - start, owned.stop - start),) if owned else ()

    @property
    def other_places(self) -> tuple[slice, ...]:
        """The positions in the shard of the indices that another rank owns, as runs along `dim`."""
        held, owned = len(self.held_indices), self.owned_places
        if not owned:
            return (slice(0, held),) if held else ()
        own = owned[0]
        return tuple(each for each in (slice(0, own.start), slice(own.stop, held))
                     if each.start < each.stop)  # fmt: skip

    def held_leaves(self) -> Iterator[HeldLeaf]:
        """Every leaf of which this rank holds some indices."""
        if self.cut is None or self.dim is None or self.held is None:
            yield HeldLeaf(0, self.shape, (((), ()),))
            return
        before, start = (slice(None),) * self.dim, self.cut.units(self.held).start
        for leaf in self.held:
            units = self.cut.leaf(leaf)
            shape = (*self.shape[: self.dim], len(units), *self.shape[self.dim + 1 :])
            where = slice(units.start - start, units.stop - start)
            yield HeldLeaf(leaf, shape, (((*before, where), ()),))

    def copies(self) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Parts that several ranks may hold and one owns: name, and positions in the shard."""
        if self.cut is not None and self.cut.runs is not None and self.dim is not None:
            for leaf, _, pieces in self.held_leaves():
                yield f"leaf {leaf}", tuple(where[self.dim] for where, _ in pieces)

    def reshaped(self, shape: tuple[int, ...]) -> "Layout":
        """The layout on this rank of a tensor with another shape, but the same size along `dim`."""
        return Layout(tuple(shape), self.rank, self.dim, self.cut, self.held)

    def of(self, rank: int) -> "Layout":
        """The same tensor's layout on another rank, which holds what it owns."""
        return Layout(self.shape, rank, self.dim, self.cut)

    def state(self) -> dict[str, object]:
        """Plain data that identifies a layout, for `state_dict`."""
        if self.cut is None or self.held is None:
            return {"shape": list(self.shape), "dim": None}
        return {
            "shape": list(self.shape),
            "dim": self.dim,
            "leaves": self.cut.leaves,
            "degree": self.cut.degree,
            "rank": self.rank,
            "held": [self.held.start, self.held.stop],
            **({} if self.cut.unit == 1 else {"unit": self.cut.unit}),
        }


def replicated(shape: tuple[int, ...], *, rank: int = 0) -> Layout:
    """Layout of a tensor that every rank holds whole."""
    return Layout(tuple(shape), rank)
