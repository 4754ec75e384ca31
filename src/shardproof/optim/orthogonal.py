"""The orthogonalisation of Muon on a matrix whose columns are cut, with bounded memory.

A quintic Newton-Schulz iteration: with A = X X^T, X becomes a X + (b A + c A A) X (Jordan et al.,
"Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/). X has no more rows than columns.

X = (rows, columns) is cut along its columns, A along its rows, and no rank has a buffer larger than
its share of X:

- A is a sum over the leaves of the columns: partial products of a leaf of A's columns at a time,
  added by the canonical tree, each rank getting its rows (reduce_scatter).
- A A is A A^T, for A is symmetric: a rank has its rows of A, and is sent the others' (all_gather).
- The last product needs this rank's columns of X and all rows of b A + c A A, which are sent again.

The number of leaves that are sent together depends on the degree (as many as fit into a share). The
products do not: each is of one leaf of rows. So the bits are the same at every degree.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof import comm
from shardproof.axis import Axis
from shardproof.leaves import Cut
from shardproof.numerics.matmul import product_columns, product_nodes, product_rows
from shardproof.tree import Node


@dataclass(frozen=True)
class Iteration:
    """Options of the iteration.

    Attributes:
        coefficients: a, b, c.
        steps: number of steps.
        dtype: dtype to which X and A are rounded after they are computed. Before that, products are
            accumulated, and sums over leaves added, in fp32 (fp64 in fp64).
    """

    coefficients: tuple[float, float, float]
    steps: int
    dtype: torch.dtype

    def round(self, x: Tensor) -> Tensor:
        """Round `x` to the iteration's dtype; the result keeps the dtype of `x`."""
        return x if x.dtype == self.dtype else x.to(self.dtype).to(x.dtype)


@dataclass(frozen=True)
class Spread:
    """The layouts of X and A on one rank.

    Attributes:
        columns: cut of the columns of X.
        rows: cut of the rows of A, which has as many rows as X.
        rank: the rank.
        held: leaves of the columns that the rank holds.
        who: name for messages.
    """

    columns: Cut
    rows: Cut
    rank: int
    held: range
    who: str

    @functools.cached_property
    def owned_slices(self) -> tuple[slice, ...]:
        """The slice of each owned leaf of the columns in this rank's part."""
        return self.columns.leaf_slices(self.rank, self.held)

    @functools.cached_property
    def held_slices(self) -> tuple[slice, ...]:
        """The slice of each held leaf of the columns in this rank's part."""
        start = self.columns.units(self.held).start
        leaves = (self.columns.leaf(leaf) for leaf in self.held)
        return tuple(slice(each.start - start, each.stop - start) for each in leaves)

    @functools.cached_property
    def row_slices(self) -> tuple[slice, ...]:
        """The slice of each owned leaf of the rows in this rank's rows of A."""
        return self.rows.leaf_slices(self.rank)

    @functools.cached_property
    def groups(self) -> tuple["LeafGroup", ...]:
        """Groups of row leaves that are sent together, as many as fit into the largest share."""
        room = max(self.columns.sizes())
        groups: list[range] = []
        for leaf in range(self.rows.num_leaves):
            last = groups[-1] if groups else range(0)
            if last and len(self.rows.units(range(last.start, leaf + 1))) <= room:
                groups[-1] = range(last.start, leaf + 1)
            else:
                groups.append(range(leaf, leaf + 1))
        return tuple(LeafGroup(self.rows, self.rank, leaves) for leaves in groups)


@dataclass(frozen=True)
class LeafGroup:
    """Neighbouring leaves of the rows of A that are sent together.

    Attributes:
        rows: cut of all rows.
        rank: the rank.
        leaves: the leaves of the group.
    """

    rows: Cut
    rank: int
    leaves: range

    @functools.cached_property
    def units(self) -> range:
        """Rows of the group."""
        return self.rows.units(self.leaves)

    @functools.cached_property
    def cut(self) -> Cut:
        """The cut of the group's rows among the ranks."""
        runs = tuple(self._within(rank) for rank in range(self.rows.degree))
        return Cut(len(self.units), self.rows.leaves, self.rows.degree, runs=runs)

    def own(self, x: Tensor) -> Tensor:
        """The part of this rank's rows that belongs to the group."""
        mine, within = self.rows.owned(self.rank), self._within(self.rank)
        start = self.units.start + within.start - mine.start if within else 0
        return x.narrow(0, start, len(within))

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """The slices of each leaf in all rows and in the group."""
        for leaf in self.leaves:
            at = self.rows.leaf(leaf)
            first = self.units.start
            yield slice(at.start, at.stop), slice(at.start - first, at.stop - first)

    def _within(self, rank: int) -> range:
        """Rows of the group that a rank owns, counted in the group."""
        owned, first = self.rows.owned(rank), self.units.start
        start = min(max(owned.start - first, 0), len(self.units))
        stop = min(max(owned.stop - first, 0), len(self.units))
        if not owned or start >= stop:
            # An idle rank has an empty run, at the end of the runs before it.
            return range(0)
        return range(start, stop)


# Cached for each kind of matrix: products keep their preparations under its slices.
spread_of = functools.lru_cache(1024)(Spread)


def orthogonalize(x: Tensor, spread: Spread, iteration: Iteration, axis: Axis) -> Tensor:
    """Iterate X to (nearly) orthogonal rows.

    Args:
        x: (rows, held columns), Shard(1), of norm at most 1, rounded to the iteration's dtype; in
            fp32 or fp64.
        spread: the layouts of X and A.
        iteration: options of the iteration.
        axis: the ranks that share the matrix.

    Returns:
        (rows, held columns), Shard(1), in the dtype of `x`.

    Comm:
        update one reduce_scatter of (rows, rows) per iteration; update one all_gather of
        (rows, rows) per product.
    """
    a, b, c = iteration.coefficients
    for _ in range(iteration.steps):
        gram = iteration.round(_gram(x, spread, axis))
        update = iteration.round(_square(gram, spread, iteration, axis).mul_(c).add_(gram, alpha=b))
        x = iteration.round(_applied(update, x, a, spread, iteration, axis))
    return x


def _gram(x: Tensor, spread: Spread, axis: Axis) -> Tensor:
    """X X^T: (owned rows, rows), Shard(0)."""
    columns, rows = spread.columns, spread.rows
    gram = x.new_empty(len(rows.owned(spread.rank)), rows.size)
    for group in spread.groups:
        leaves: list[dict[Node, Tensor]] = [
            product_nodes(
                x,
                x[at],
                spread.owned_slices,
                run=columns.run(spread.rank),
                num_leaves=columns.num_leaves,
                is_transposed=True,
            )
            for at, _ in group.parts()
        ]
        nodes = {node: torch.cat([leaf[node] for leaf in leaves], dim=1) for node in leaves[0]}
        units = group.units
        gram[:, units.start : units.stop] = comm.reduce_scatter_nodes(
            nodes,
            axis,
            cut=columns,
            into=comm.ShardOf((rows.size, len(units)), 0, rows),
            like=x,
            direction="update",
            who=spread.who,
        )
    return gram


def _square(gram: Tensor, spread: Spread, iteration: Iteration, axis: Axis) -> Tensor:
    """A A^T: (owned rows, rows), Shard(0)."""
    square = torch.empty_like(gram)
    for group in spread.groups:
        block = _whole(gram, group, spread, iteration, axis)
        for at, within in group.parts():
            square[:, at] = product_rows(gram, block[within].t(), spread.row_slices)
    return square


def _applied(
    update: Tensor, x: Tensor, a: float, spread: Spread, iteration: Iteration, axis: Axis
) -> Tensor:
    """The next X, a X + B X with B = `update`: (rows, held columns), Shard(1)."""
    y = torch.empty_like(x)
    for group in spread.groups:
        block = _whole(update, group, spread, iteration, axis)
        for at, within in group.parts():
            y[at] = product_columns(block[within], x, spread.held_slices).add_(x[at], alpha=a)
    return y


def _whole(
    mine: Tensor, group: LeafGroup, spread: Spread, iteration: Iteration, axis: Axis
) -> Tensor:
    """Gather a group's rows of a matrix whose rows are cut, sent in the iteration's dtype."""
    part = group.own(mine).to(iteration.dtype)
    rows = comm.all_gather(part, axis, dim=0, cut=group.cut, direction="update", who=spread.who)
    return rows.to(mine.dtype)
