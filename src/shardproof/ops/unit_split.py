"""`UnitSplit`: a dim that is cut by units, with its axis, runs and leaves.

Everything here is integers that are worked out once. A leaf of a dim has several *pieces*: runs of
indices of the whole dim, such as its columns of the queries, the keys and the values in one fused
weight. Pieces are runs of the whole dim and not of what a rank holds, in which two pieces may come
to lie side by side at one degree and not at another: then a sum over them would have the bits of
the degree.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from shardproof import operators
from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.errors import ShapeError
from shardproof.leaves import Cut
from shardproof.numerics.arithmetic import Arithmetic, arithmetic_of
from shardproof.observing import Placement, shard
from shardproof.scheme import Scheme
from shardproof.units import CutDim, Indices, slices_of

_MOST_PIECES = 8  # of a leaf; where there are more, its indices are brought together by a copy
_NONE = slice(0, 0)


class Selection:
    """Some indices of a dim, in any order, picked as cheaply as their order allows.

    Args:
        indices: which.
        size: of the dim.
    """

    def __init__(self, indices: Indices, size: int) -> None:
        self.indices = indices
        runs = slices_of(indices)
        self._run = runs[0] if len(runs) == 1 else _NONE if not runs else None
        self.is_all = len(indices) == size and (not size or self._run == slice(0, size))
        self._tensors: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def of(self, x: Tensor, dim: int) -> Tensor:
        """The indices of `x` along `dim`: `x` itself or a view where that is possible."""
        if self.is_all:
            return x
        if self._run is not None:
            return x.narrow(dim, self._run.start, self._run.stop - self._run.start)
        return x.index_select(dim, self.on(x.device))

    def copy(self, x: Tensor, dim: int) -> Tensor:
        """The indices of `x` along `dim`, as a new tensor."""
        if self._run is None:
            return x.index_select(dim, self.on(x.device))
        return self.of(x, dim).clone(memory_format=torch.contiguous_format)

    def on(self, device: torch.device) -> Tensor:
        """The indices as a tensor, (len(self),) int64."""
        index = self._tensors.get(device)
        if index is None:
            with operators.unrecorded(), torch.inference_mode(False):
                index = torch.from_numpy(np.ascontiguousarray(self.indices)).to(device)
            self._tensors[device] = index
        return operators.constant(index)


@dataclass(frozen=True)
class Pieces:
    """Where the leaves that a rank owns lie in what it holds, as `joined_nodes` takes it.

    Attributes:
        slices: of each round, one run for every leaf; `slice(0, 0)` where a leaf has fewer pieces.
        order: None; or the indices that are owned, leaf by leaf: `slices` count in these.
    """

    slices: tuple[tuple[slice, ...], ...]
    order: Selection | None = None

    def bring(self, x: Tensor, dim: int) -> Tensor:
        """`x` as the slices count: itself, or its owned indices leaf by leaf.

        Those are always a copy: its strides may not depend on what the rank owns.
        """
        return x if self.order is None else self.order.copy(x, dim)


# By what a place is of; a place lives as long as somebody keeps it.
_places: weakref.WeakValueDictionary[tuple[Axis, CutDim, Scheme, str], "UnitSplit"] = (
    weakref.WeakValueDictionary()
)


@dataclass(frozen=True, eq=False)
class UnitSplit:
    """A dim that is cut by units. It has no tensors.

    Two values are equal only if they are the same object; use `of`.

    Attributes:
        axis: the axis over which the dim is cut.
        cut_dim: how the dim is cut.
        scheme: leaves and numerics.
        who: the layer's name, for messages and the ledger.
        size, length: of the whole dim, and of what this rank holds.
        run, num_leaves: this rank's leaves, and how many there are.
        cut: of the units: its leaves are those of every sum over the dim.
        held: the indices that this rank holds.
        owned: which of those it owns, counted in what it holds.
        sizes: how many indices every rank owns.
        order: brings what the ranks own, side by side, in the order of the dim.
        pieces: where the owned leaves lie.
        even_leaf: how long every leaf is that this rank owns, if all of what it holds is such
            leaves, one after another; else 0.
        tiles: runs of what it holds that are the same at every degree which holds them.
        plain: the dim as a plain cut of one run per rank, or None.
        split: of the units, for every sum over the dim.
        plain_split: of `plain`, or None.
        arithmetic: how the dim is multiplied and added.
        recipes: what others have worked out for this place, by what it is for.
    """

    axis: Axis
    cut_dim: CutDim
    scheme: Scheme
    who: str = ""
    size: int = field(init=False, repr=False)
    length: int = field(init=False, repr=False)
    run: range = field(init=False, repr=False)
    num_leaves: int = field(init=False, repr=False)
    cut: Cut = field(init=False, repr=False)
    held: Selection = field(init=False, repr=False)
    owned: Selection = field(init=False, repr=False)
    sizes: tuple[int, ...] = field(init=False, repr=False)
    order: Selection = field(init=False, repr=False)
    pieces: Pieces = field(init=False, repr=False)
    even_leaf: int = field(init=False, repr=False)
    tiles: tuple[slice, ...] = field(init=False, repr=False)
    plain: Cut | None = field(init=False, repr=False)
    split: Split = field(init=False, repr=False)
    plain_split: Split | None = field(init=False, repr=False)
    arithmetic: Arithmetic = field(init=False, repr=False)
    recipes: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        axis, cut_dim = self.axis, self.cut_dim
        shared, rank = cut_dim.shared, axis.rank
        if shared.degree != axis.size:
            raise ShapeError(
                f"{self.who or 'a cut dim'} on {axis}: its units are shared by {shared.degree} "
                f"ranks, and the axis has {axis.size}. Use Shared(units, leaves, axis.size)."
            )
        held, owned = cut_dim.held(rank), cut_dim.owned(rank)
        owned_by_rank = [cut_dim.owned(each) for each in range(axis.size)]
        plain, pieces = _plain(cut_dim), _pieces(cut_dim, rank)
        derived_fields = {
            "size": cut_dim.size,
            "length": len(held),
            "run": shared.cut.run(rank),
            "num_leaves": shared.cut.num_leaves,
            "cut": shared.cut,
            "held": Selection(held, cut_dim.size),
            "owned": Selection(np.searchsorted(held, owned), len(held)),
            "sizes": tuple(map(len, owned_by_rank)),
            "order": Selection(np.argsort(np.concatenate(owned_by_rank)), cut_dim.size),
            "pieces": pieces,
            "even_leaf": _even_leaf(pieces, len(held)),
            "tiles": _tiles(cut_dim, rank),
            "plain": plain,
            "split": Split(axis, shared.cut, self.scheme, self.who),
            "plain_split": None if plain is None else Split(axis, plain, self.scheme, self.who),
            "arithmetic": arithmetic_of(self.scheme),
        }
        for name, value in derived_fields.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, axis: Axis, cut_dim: CutDim, scheme: Scheme, who: str = "") -> Self:
        """The place of these; the same object for the same ones while somebody keeps it."""
        key = (axis, cut_dim, scheme, who)
        place = _places.get(key)
        if place is None:
            place = _places[key] = cls(axis, cut_dim, scheme, who)
        return place  # type: ignore[return-value]  # of this class, which nobody derives from

    @property
    def is_plain_torch(self) -> bool:
        """Whether nothing here differs from torch: one rank, native numerics."""
        return self.axis.size == 1 and not self.arithmetic.is_invariant

    @property
    def tree(self) -> tuple[int, ...]:
        """What tells two trees apart that may not be added node by node, at every degree alike."""
        units = self.cut_dim.shared.units
        if units.breaks is None:
            return (self.num_leaves,)
        return (self.num_leaves, units.count, *units.breaks)

    def placement(self, dim: int) -> Placement:
        """How a tensor lies that is cut along `dim` here, for observers."""
        return shard(dim, None, self.size)


def _plain(cut_dim: CutDim) -> Cut | None:
    """The dim as a `Cut`, if it is one block of all the units."""
    shared, units = cut_dim.shared, cut_dim.shared.units
    if len(cut_dim.blocks) != 1:
        return None
    (block,) = cut_dim.blocks
    if block.first or block.size != units.count * block.unit:
        return None
    return Cut(block.size, shared.leaves, shared.degree, block.unit, runs=shared.cut.runs)


def _pieces(cut_dim: CutDim, rank: int) -> Pieces:
    """The pieces of the leaves that a rank owns."""
    held, run = cut_dim.held(rank), cut_dim.shared.cut.run(rank)
    leaves = np.asarray(cut_dim.shared.leaf_of, dtype=np.int64)[cut_dim.labels]
    if _most_pieces(leaves) > _MOST_PIECES:
        return _sorted_pieces(leaves, held, run)
    of_leaves = [
        [_within(held, each) for each in slices_of(np.flatnonzero(leaves == leaf))] for leaf in run
    ]
    rounds = max(1, _most_pieces(leaves))
    return Pieces(
        tuple(
            tuple(pieces[each] if each < len(pieces) else _NONE for pieces in of_leaves)
            for each in range(rounds)
        )
    )


def _even_leaf(pieces: Pieces, length: int) -> int:
    """The length of every leaf, if all that is held is leaves of one length, in order; else 0."""
    first, *more = pieces.slices
    if pieces.order is not None or more or not first:
        return 0
    size = first[0].stop
    is_even = all(at == slice(n * size, (n + 1) * size) for n, at in enumerate(first))
    return size if is_even and size * len(first) == length else 0


def _most_pieces(leaves: Indices) -> int:
    """How many pieces the leaf of most has, on any rank."""
    if not len(leaves):
        return 0
    starts = np.flatnonzero(np.diff(leaves, prepend=leaves[0] - 1))
    return int(np.bincount(leaves[starts]).max())


def _sorted_pieces(leaves: Indices, held: Indices, run: range) -> Pieces:
    """One piece for each leaf, of indices that are brought together."""
    of_leaves = [np.searchsorted(held, np.flatnonzero(leaves == leaf)) for leaf in run]
    stops = np.cumsum([0, *map(len, of_leaves)]).tolist()
    slices = tuple(slice(stops[each], stops[each + 1]) for each in range(len(of_leaves)))
    order = np.concatenate(of_leaves) if of_leaves else np.zeros(0, dtype=np.int64)
    return Pieces((slices,), Selection(order, len(held)))


def _tiles(cut_dim: CutDim, rank: int) -> tuple[slice, ...]:
    """Runs of what a rank holds: of one leaf each and, of shared units, of one unit each.

    A rank may hold one shared unit of a leaf and not the next, so that a leaf would be too much.
    """
    shared, labels, held = cut_dim.shared, cut_dim.labels, cut_dim.held(rank)
    count = shared.units.count
    leaves = np.asarray(shared.leaf_of, dtype=np.int64)[labels]
    kinds = np.where(labels < count, leaves, labels - count + shared.cut.num_leaves)
    changes = np.flatnonzero(np.diff(kinds)) + 1
    starts = [0, *changes.tolist()]
    mine = set(held.tolist())
    bounds = zip(starts, [*starts[1:], len(labels)], strict=True)
    return tuple(
        _within(held, slice(start, stop)) for start, stop in bounds if start in mine and stop
    )


def _within(held: Indices, piece: slice) -> slice:
    """A run of the whole dim, all of which is held, in what is held."""
    start = int(np.searchsorted(held, piece.start))
    return slice(start, start + piece.stop - piece.start)
