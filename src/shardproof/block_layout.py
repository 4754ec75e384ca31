"""`BlockLayout`: the layout of a tensor whose cut dim has several blocks of units.

The rows of a fused projection are those of the query heads, then of the key heads, then of the
value heads. A rank has a run of each block, in the order of the whole, and a leaf has a run of each
too. Every rank that needs a shared unit holds it, and one rank owns it. Integers only.

`cut_layout` makes a layout of any kind: a dim of one block gives a `Layout`, which is faster.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from shardproof.errors import LayoutError, ShapeError
from shardproof.leaves import Cut, HeldLeaf, Layout
from shardproof.units import Block, CutDim, Indices, Shared, common_runs, slices_of


@dataclass(frozen=True)
class BlockLayout(Layout):
    """A `Layout` whose dim is cut by a `CutDim`.

    Attributes:
        along: how `dim` is cut.
        cut: the cut of the units, not of the indices.
        held: the leaves that the rank owns. It may also hold shared units of other leaves.
    """

    along: CutDim = field(kw_only=True)

    def __post_init__(self) -> None:
        along, dim = self.along, self.dim
        if dim is None or not 0 <= dim < len(self.shape):
            raise ShapeError(
                f"dim {dim} is not one of the {len(self.shape)} dims of shape {self.shape}; "
                "count from the left."
            )
        if along.size != self.shape[dim]:
            raise ShapeError(
                f"dim {dim} of shape {self.shape} has {self.shape[dim]} indices, its blocks "
                f"{along.size}."
            )
        object.__setattr__(self, "cut", along.shared.cut)
        object.__setattr__(self, "held", along.shared.cut.run(self.rank))

    @property
    def owned(self) -> range:
        """The indices that this rank owns, as one run.

        Raises:
            LayoutError: they are several runs.
        """
        return self._one(self.owned_runs, "owns")

    @property
    def held_indices(self) -> range:
        """The indices that this rank holds, as one run.

        Raises:
            LayoutError: they are several runs.
        """
        return self._one(self.held_runs, "holds")

    def _one(self, runs: tuple[range, ...], what: str) -> range:
        if len(runs) > 1:
            raise LayoutError(
                f"rank {self.rank} {what} {len(runs)} runs of dim {self.dim} of shape "
                f"{self.shape}, and one was asked for. Ask for owned_runs or held_runs."
            )
        return runs[0] if runs else range(0)

    @cached_property
    def owned_runs(self) -> tuple[range, ...]:
        """Indices that this rank owns, as runs."""
        return _runs(self.along.owned(self.rank))

    @cached_property
    def held_runs(self) -> tuple[range, ...]:
        """Indices that this rank holds, as runs, in the order in which its shard has them."""
        return _runs(self.along.held(self.rank))

    @property
    def leaf_places(self) -> tuple[tuple[slice, ...], ...]:
        """For each leaf that this rank owns, the positions of its runs in the shard."""
        return self.along.leaf_slices(self.rank)

    @property
    def owned_places(self) -> tuple[slice, ...]:
        """The positions in the shard of the indices that this rank owns, as runs along `dim`."""
        return self.along.owned_places(self.rank)

    @cached_property
    def other_places(self) -> tuple[slice, ...]:
        """The positions in the shard of the indices that another rank owns, as runs along `dim`."""
        held, owned = self.along.held(self.rank), self.along.owned(self.rank)
        return slices_of(np.flatnonzero(~np.isin(held, owned, assume_unique=True)))

    def held_leaves(self) -> Iterator[HeldLeaf]:
        """Every leaf of which this rank holds some indices."""
        along, dim = self.along, self.dim or 0
        held, before = along.held(self.rank), (slice(None),) * dim
        leaf_of = np.asarray(along.shared.leaf_of, dtype=np.int64)[along.labels]
        for leaf in np.unique(leaf_of[held]).tolist():
            indices = np.flatnonzero(leaf_of == leaf)
            here = np.intersect1d(held, indices, assume_unique=True)
            places, parts = np.searchsorted(held, here), np.searchsorted(indices, here)
            shape = (*self.shape[:dim], len(indices), *self.shape[dim + 1 :])
            pieces = tuple(
                ((*before, where), (*before, part)) for where, part in common_runs(places, parts)
            )
            yield HeldLeaf(leaf, shape, pieces)

    def copies(self) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Shared units that this rank holds: name, and positions in the shard."""
        count = self.along.shared.units.count
        labels = self.along.labels[self.along.held(self.rank)]
        for unit in np.unique(labels[labels >= count]).tolist():
            yield f"shared unit {unit - count}", slices_of(np.flatnonzero(labels == unit))

    def of(self, rank: int) -> "BlockLayout":
        """The same tensor's layout on another rank."""
        return BlockLayout(self.shape, rank, self.dim, along=self.along)

    def reshaped(self, shape: tuple[int, ...]) -> "BlockLayout":
        """The layout on this rank of a tensor with another shape, but the same size along `dim`."""
        return BlockLayout(tuple(shape), self.rank, self.dim, along=self.along)

    def state(self) -> dict[str, object]:
        """Plain data that identifies a layout, for `state_dict`."""
        shared = self.along.shared
        breaks = shared.units.breaks
        return {
            "shape": list(self.shape),
            "dim": self.dim,
            "leaves": shared.leaves,
            "degree": shared.degree,
            "rank": self.rank,
            "units": shared.units.count,
            "blocks": [[each.size, each.first, each.unit] for each in self.along.blocks],
            **({"needers": list(map(list, shared.units.needers))} if shared.units.needers else {}),
            **({} if breaks is None else {"breaks": list(breaks)}),
        }


def cut_layout(shape: tuple[int, ...], rank: int, *, dim: int, along: CutDim) -> Layout:
    """The layout on a rank of a tensor with one cut dim.

    Args:
        shape: shape of the whole tensor.
        rank: the rank.
        dim: the dim that is cut.
        along: how it is cut.

    Returns:
        A `Layout` if each rank holds one run of one block with the units in order, and with the
        same leaves and owners; else a `BlockLayout`.

    Raises:
        ShapeError: `along` does not have the size of that dim.
    """
    block = along.blocks[0] if len(along.blocks) == 1 else None
    if block is not None and dim < len(shape) and along.size == shape[dim]:
        layout = _of_units(along.shared, block) or _of_shared(along.shared, block)
        if layout is not None:
            cut, held = layout
            return Layout(tuple(shape), rank, dim, cut, held[rank])
    return BlockLayout(tuple(shape), rank, dim, along=along)


def _of_units(shared: Shared, block: Block) -> tuple[Cut, tuple[range, ...]] | None:
    """The cut of a dim that has every unit once, in order, or None."""
    units = shared.units
    if block.first or block.size != units.count * block.unit:
        return None
    cut = Cut(block.size, shared.leaves, shared.degree, block.unit, shared.cut.runs)
    return cut, tuple(cut.run(rank) for rank in range(shared.degree))


def _of_shared(shared: Shared, block: Block) -> tuple[Cut, tuple[range, ...]] | None:
    """The cut of a dim with every shared unit once, in order, each as a leaf; or None."""
    count, number = shared.units.count, len(shared.units.needers)
    if block.first != count or block.size != number * block.unit:
        return None
    ranks = range(shared.degree)
    owned, held = (
        [_run([unit - count for unit in each if unit >= count]) for each in lists]
        for lists in (
            [[u for u, owner in enumerate(shared.owner_of) if owner == rank] for rank in ranks],
            [sorted(shared.holds(rank)) for rank in ranks],
        )
    )
    if any(run is None for run in (*owned, *held)):
        return None
    runs, start = [], 0
    for run in owned:
        if run and run.start != start:
            return None  # the owners are not in rank order
        runs.append(range(start, start + len(run or ())))
        start = runs[-1].stop
    cut = Cut(block.size, shared.leaves, shared.degree, block.unit, tuple(runs))
    return cut, tuple(run or range(0) for run in held)


def _run(numbers: list[int]) -> range | None:
    """Ascending numbers as a range; None if there is a gap."""
    if not numbers:
        return range(0)
    run = range(numbers[0], numbers[-1] + 1)
    return run if len(run) == len(numbers) else None


def _runs(indices: Indices) -> tuple[range, ...]:
    return tuple(range(each.start, each.stop) for each in slices_of(indices))
