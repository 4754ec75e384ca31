"""Shared units to the units that they serve: key-value heads to query heads, cut more finely.

In forward, every index of the target is one of the source, which this rank holds. In backward, the
gradient of a source index is the sum over the units that it serves, added by the canonical tree. If
these units are on several ranks, each rank gives the nodes that it can add alone, and all ranks
that hold the index add the rest.

The recipe of a call is worked out once and kept with its places.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.comm.runs_of_indices import all_gather_sizes
from shardproof.errors import ShapeError
from shardproof.numerics.precision import node_dtype
from shardproof.ops.unit_moves import checked_dim
from shardproof.ops.unit_split import Selection, UnitSplit
from shardproof.tree import Node
from shardproof.units import Indices

Sources = Sequence[int] | Indices


@dataclass(frozen=True)
class _Kind:
    """Source indices that are summed alike.

    Attributes:
        sources: which, in order.
        served: how many units each serves.
        runs: for every rank, which of those units it owns.
        is_sent: several ranks hold them, so that what each rank has added is gathered.
        picks: for each unit that this rank owns, where the targets lie in what it holds, a column
            for each index of the unit: (units, several, sources).
        at: where this rank holds them; None if it does not.
    """

    sources: Indices
    served: int
    runs: tuple[range, ...]
    is_sent: bool
    picks: tuple[tuple[Selection, ...], ...]
    at: Indices | None


class Recipe:
    """How the gradients of source indices are added, on one rank.

    Attributes:
        picked: for every target index that the rank holds, its source in what the rank holds.
        place: of the source.
    """

    def __init__(self, place: UnitSplit, target: UnitSplit, sources: Indices) -> None:
        self.place = place
        rank = place.axis.rank
        held = place.cut_dim.held(rank)
        needed_sources = sources[target.cut_dim.held(rank)]
        self.picked = Selection(_positions(held, needed_sources, place), len(held))
        self.kinds = _kinds(place, target, sources)
        self.sizes = tuple(
            sum(
                len(self.nodes(kind, each)) * len(kind.sources)
                for kind in self.kinds
                if kind.is_sent
            )
            for each in range(place.axis.size)
        )
        at = [kind.at for kind in self.kinds if kind.at is not None]
        self.order = Selection(
            np.argsort(np.concatenate(at)) if at else np.zeros(0, dtype=np.int64), len(held)
        )

    def nodes(self, kind: _Kind, rank: int) -> list[Node]:
        """What `rank` adds of each source: native numerics add all that it has."""
        return self.place.arithmetic.nodes(kind.served, kind.runs[rank])

    def gradient(self, grad_y: Tensor, dim: int) -> Tensor:
        """(*, held targets, *), Shard(dim), to (*, held sources, *), complete at every holder."""
        grad = grad_y.movedim(dim, 0)
        shape = (0, *grad.shape[1:])
        gathered = self._gathered(grad) if sum(self.sizes) else {}
        parts = []
        for number, kind in enumerate(self.kinds):
            if kind.at is None:
                continue
            values = gathered[number] if kind.is_sent else self._served(kind, grad)
            parts.append(self._sum((0, kind.served), values, grad, len(kind.sources)))
        whole = torch.cat(parts) if parts else grad.new_empty(shape)
        return self.order.of(whole, 0).movedim(0, dim).to(grad_y.dtype).contiguous()

    def _gathered(self, grad: Tensor) -> dict[int, dict[Node, Tensor]]:
        """Kinds of which several ranks hold the sources -> what all ranks have added of them."""
        place, sent = self.place, [(n, k) for n, k in enumerate(self.kinds) if k.is_sent]
        mine = [
            self._sum(node, self._served(kind, grad), grad, len(kind.sources))
            for _, kind in sent
            for node in self.nodes(kind, place.axis.rank)
        ]
        wide = node_dtype(grad.dtype)
        own = torch.cat(mine) if mine else grad.new_empty(0, *grad.shape[1:], dtype=wide)
        everything = all_gather_sizes(
            own, place.axis, dim=0, sizes=self.sizes, direction="backward", who=place.who
        )
        sums: dict[int, dict[Node, Tensor]] = {number: {} for number, _ in sent}
        start = 0
        for rank, (number, kind) in itertools.product(range(place.axis.size), sent):
            for node in self.nodes(kind, rank):
                sums[number][node] = everything.narrow(0, start, len(kind.sources))
                start += len(kind.sources)
        return sums

    def _served(self, kind: _Kind, grad: Tensor) -> dict[Node, Tensor]:
        """What each unit that this rank owns has of the sources, by itself."""
        run = kind.runs[self.place.axis.rank]
        wide = node_dtype(grad.dtype)
        return {
            (unit, unit + 1): functools.reduce(
                torch.add, [pick.of(grad, 0).to(wide) for pick in picks]
            )
            for unit, picks in zip(run, kind.picks, strict=True)
        }

    def _sum(self, node: Node, values: Mapping[Node, Tensor], like: Tensor, length: int) -> Tensor:
        """The sum of a node; zeros where nothing is served."""
        if not values:
            return like.new_zeros(length, *like.shape[1:], dtype=node_dtype(like.dtype))
        return self.place.arithmetic.add(node, values)


def _positions(held: Indices, indices: Indices, place: UnitSplit) -> Indices:
    """Where the wanted indices lie in what is held."""
    at = np.searchsorted(held, indices)
    if len(indices) and (at.max(initial=0) >= len(held) or (held[at] != indices).any()):
        raise ShapeError(
            f"{place.who} on {place.axis}: a target index needs a source index that this rank does "
            "not hold. Let the units of the target be needers of the units of the source."
        )
    return at


def _kinds(place: UnitSplit, target: UnitSplit, sources: Indices) -> list[_Kind]:
    """Source indices by how many units they serve, and on which ranks those and the holders are."""
    axis, shared = place.axis, target.cut_dim.shared
    owner, firsts = _owners_and_firsts(target)
    labels, held_targets = target.cut_dim.labels, target.cut_dim.held(axis.rank)
    holders = [place.cut_dim.held(rank) for rank in range(axis.size)]
    holds = np.zeros((axis.size, place.size), dtype=bool)
    for rank, held in enumerate(holders):
        holds[rank, held] = True
    # Targets of each source, unit by unit in the order of the units.
    order = np.lexsort((np.arange(len(sources)), labels, firsts[labels], sources))
    bounds = np.searchsorted(sources[order], np.arange(place.size + 1))
    groups: dict[tuple[Any, ...], list[tuple[int, list[list[int]]]]] = {}
    for source in range(place.size):
        targets = order[bounds[source] : bounds[source + 1]]
        units = [
            list(each) for _, each in itertools.groupby(targets.tolist(), key=labels.__getitem__)
        ]
        ranks = tuple(int(owner[labels[each[0]]]) for each in units)
        several = tuple(map(len, units))
        key = (ranks, several, holds[:, source].tobytes())
        groups.setdefault(key, []).append((source, units))
    kinds = []
    for (ranks, several, who_holds), members in groups.items():
        runs = tuple(_run_of(ranks, rank) for rank in range(shared.degree))
        is_held = np.frombuffer(who_holds, dtype=bool)
        alone = set(ranks) or {int(np.flatnonzero(is_held)[0])}
        mine = np.array([source for source, _ in members], dtype=np.int64)
        picks = tuple(
            tuple(
                Selection(
                    np.searchsorted(held_targets, [units[unit][n] for _, units in members]),
                    len(held_targets),
                )
                for n in range(several[unit])
            )
            for unit in runs[axis.rank]
        )
        at = np.searchsorted(holders[axis.rank], mine) if is_held[axis.rank] else None
        is_sent = bool(ranks) and {int(r) for r in np.flatnonzero(is_held)} != alone
        is_sent = is_sent or len(alone) > 1
        kinds.append(_Kind(mine, len(ranks), runs, is_sent, picks, at))
    return kinds


def _owners_and_firsts(target: UnitSplit) -> tuple[Indices, Indices]:
    """Of every unit of the target: the rank that owns it, and its place among the plain units."""
    shared = target.cut_dim.shared
    firsts = [*range(shared.units.count), *(needers[0] for needers in shared.units.needers)]
    return np.asarray(shared.owner_of, dtype=np.int64), np.asarray(firsts, dtype=np.int64)


def _run_of(ranks: tuple[int, ...], rank: int) -> range:
    """The places of a rank in a list of ranks that rises."""
    places = [place for place, each in enumerate(ranks) if each == rank]
    return range(places[0], places[-1] + 1) if places else range(0)


def recipe_of(place: UnitSplit, target: UnitSplit, source_index: Sources) -> Recipe:
    """The recipe of these, worked out on the first call.

    Args:
        place: of the source.
        target: of the target.
        source_index: for every target index its source, counted in the whole dims.
    """
    key = ("serve", id(target), id(source_index))
    entry = place.recipes.get(key)
    if entry is not None:
        recipe: Recipe = entry[0]
        return recipe
    sources = np.asarray(source_index, dtype=np.int64)
    _check(place, target, sources)
    new_recipe = Recipe(place, target, sources)
    if isinstance(source_index, tuple):  # what could change is not kept
        place.recipes[key] = (
            new_recipe,
            target,
            source_index,
        )  # kept alive: the key is their identity
    return new_recipe


def _check(place: UnitSplit, target: UnitSplit, sources: Indices) -> None:
    is_index = sources.shape == (target.size,)
    if not is_index or sources.min() < 0 or sources.max() >= place.size:
        raise ShapeError(
            f"{place.who} on {place.axis}: source_index has shape {sources.shape}, and the target "
            f"dim has {target.size} indices, each with one of {place.size} sources. Give one "
            "source for every target index."
        )
    if place.cut_dim.shared != target.cut_dim.shared:
        raise ShapeError(
            f"{place.who} on {place.axis}: source and target are cut by different units. Cut both "
            "by one Shared."
        )


def where_served(place: UnitSplit, target: UnitSplit, source_index: Sources) -> tuple[int, ...]:
    """For each target index that the rank holds, the position of its source in this rank's part.

    Args:
        place: of the source.
        target: of the target.
        source_index: as in `serve`.
    Raises:
        ShapeError: the rank does not hold what its targets need.
    """
    return tuple(map(int, recipe_of(place, target, source_index).picked.indices))


class _Serve(torch.autograd.Function):
    """A local selection forward; trees over the units that are served backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, recipe: Recipe) -> Tensor:
        ctx.dim, ctx.recipe = dim, recipe
        return recipe.picked.copy(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return ctx.recipe.gradient(grad_y, ctx.dim), None, None


def serve(
    x: Tensor, dim: int, place: UnitSplit, target: UnitSplit, source_index: Sources
) -> Tensor:
    """Indices of shared units to those of the units that need them.

    Args:
        x: (*, held, *), Shard(dim), of the source. Of each of its `sources` that several ranks
            hold, those ranks add `parts` of the gradient: canonical nodes, of which all are sent.
        dim: counted from either end.
        place: of the source dim.
        target: of the result's dim, cut by the same units.
        source_index: for every index of the whole target dim, its index in the whole source dim; a
            tuple is looked at once.
    Returns:
        (*, held of the target, *), Shard(dim), a new tensor; its gradient is expected to be
        complete at every rank that holds an index.
    Raises:
        ShapeError: `x` is not what this rank holds, or it does not hold what its targets need.
    Comm:
        forward none; backward none.
        several ranks hold a source: forward none; backward one all_gather of (*, parts, sources).
    """
    dim = checked_dim(x, dim, place, is_whole=False)
    return _Serve.apply(x, dim, recipe_of(place, target, source_index))
