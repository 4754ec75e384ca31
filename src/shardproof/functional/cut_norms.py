"""RMSNorm where features are cut: over all of a cut dim, and over the features of each head.

What is summed over the axis are leaves: the squares of a row (and in backward their counterpart)
where the row itself is cut, and the weight's gradient where heads are. A leaf that several ranks
hold (a key-value head) counts once, by its owner.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardproof import comm, operands
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.functional.rms import RmsFormula, normalise
from shardproof.leaves import Cut
from shardproof.numerics.matmul import node_dtype
from shardproof.numerics.sums import sum_rows, sum_squares_rows
from shardproof.scheme import Scheme
from shardproof.tree import add_run


@dataclass(frozen=True)
class NormSite:
    """Where a cut norm stands: everything that is no tensor.

    Attributes:
        axis: the ranks.
        cut: of the features: all that are normalised together, or those of all heads.
        held: the leaves that this rank holds, if more than it owns; None: what it owns.
        scheme: leaves and numerics.
        who: the layer's name, for messages and the ledger.
        width: how many features it holds.
        slices: where each leaf that it owns lies in what it holds.
        own: where all that it owns lies there.
        is_invariant: from `scheme`.
    """

    axis: Axis
    cut: Cut
    held: range | None
    scheme: Scheme
    who: str = ""
    width: int = field(init=False)
    slices: tuple[slice, ...] = field(init=False)
    own: slice = field(init=False)
    is_invariant: bool = field(init=False)

    def __post_init__(self) -> None:
        comm.check_degree_of(self.cut, self.axis, self.who or "a norm")
        rank = self.axis.rank
        slices = self.cut.leaf_slices(rank, self.held)
        held = self.cut.run(rank) if self.held is None else self.held
        own = slice(slices[0].start, slices[-1].stop) if slices else slice(0, 0)
        object.__setattr__(self, "width", len(self.cut.units(held)))
        object.__setattr__(self, "slices", slices)
        object.__setattr__(self, "own", own)
        object.__setattr__(self, "is_invariant", self.scheme.is_invariant)

    def sum_features(self, x: Tensor, direction: str, *, is_squared: bool = False) -> Tensor:
        """Sum over the cut dim, of the squares if so told: (rows, held), Shard(1), to (rows,)."""
        add = sum_squares_rows if is_squared else sum_rows
        if self.is_invariant:
            return self._sum([add(x[:, at].t()) for at in self.slices], x, x.shape[:1], direction)
        owned = x[:, self.own]
        partial = (owned.square() if is_squared else owned).sum(1)
        return comm.all_reduce(partial, self.axis, direction=direction, who=self.who)

    def sum_heads(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum over tokens and heads in backward: (tokens, held), Shard(1), to (head_dim,)."""
        size, wide = self.cut.unit, node_dtype(dtype)
        if self.is_invariant:
            sums = [sum_rows(sum_rows(x[:, at], dtype=wide).view(-1, size)) for at in self.slices]
            return self._sum(sums, x.new_empty(0, dtype=dtype), (size,), "backward")
        owned = x[:, self.own]
        partial = owned.reshape(owned.numel() // size, size).sum(0).to(dtype)
        return comm.all_reduce(partial, self.axis, direction="backward", who=self.who)

    def _sum(
        self, leaves: list[Tensor], like: Tensor, shape: tuple[int, ...], direction: str
    ) -> Tensor:
        """The sum of all ranks' leaves, by the canonical tree."""
        return comm.all_reduce_nodes(
            add_run(leaves, self.cut.run(self.axis.rank), self.cut.num_leaves),
            self.axis,
            cut=self.cut,
            shape=shape,
            like=like,
            direction=direction,
            who=self.who,
        )


def sharded_rms_norm(
    x: Tensor, weight: Tensor | None, site: NormSite, formula: RmsFormula
) -> Tensor:
    """RMSNorm over a dim that is cut, as OLMo 2 normalises queries and keys across heads.

    Args:
        x: (*, held), Shard(-1).
        weight: (held,), Shard(0), or None.
        site: axis, cut of the normalised dim, scheme, name.
        formula: which RMSNorm it is.
    Returns:
        (*, held), Shard(-1); its gradient is expected to be Shard(-1).
    Raises:
        ShapeError: `x` or the weight are not what this rank holds.
    Comm:
        forward one all_reduce of squares (*); backward one all_reduce of products (*).
    """
    operands.check_float(x, site.who or "a norm")
    _check(x, weight, site, "(*, held)", x.shape[-1:], (site.width,), (site.width,))
    return normalise(x, weight, formula, _AcrossRanks(site))


def head_rms_norm(x: Tensor, weight: Tensor | None, site: NormSite, formula: RmsFormula) -> Tensor:
    """RMSNorm over the features of each head, where heads are cut, as Qwen 3 has it.

    Args:
        x: (*, held heads, head_dim), Shard(-2).
        weight: (head_dim,), Replicate, or None.
        site: axis, cut of the features of all heads (`Heads.query_cut`, `Heads.key_cut`), scheme,
            name.
        formula: which RMSNorm it is.
    Returns:
        (*, held heads, head_dim), Shard(-2); its gradient is expected to be Shard(-2).
    Raises:
        ShapeError: `x` or the weight are not what this rank holds.
    Comm:
        forward none; backward one all_reduce of grad_weight (head_dim).
    """
    operands.check_float(x, site.who or "a norm")
    size = site.cut.unit
    wanted = (site.width // size, size)
    _check(x, weight, site, "(*, held heads, head_dim)", x.shape[-2:], wanted, (size,))
    return normalise(x, weight, formula, _ByHead(site))


@dataclass(frozen=True)
class _AcrossRanks:
    """Rows that are cut: all_reduce of their squares forward, and of products backward."""

    site: NormSite

    @property
    def size(self) -> int:
        return self.site.cut.size

    def squares(self, x: Tensor) -> Tensor:
        return self.site.sum_features(x, "forward", is_squared=True)

    def products(self, x: Tensor) -> Tensor:
        return self.site.sum_features(x, "backward")

    def weight_gradient(self, terms: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return sum_rows(terms, dtype=dtype)


@dataclass(frozen=True)
class _ByHead:
    """Rows of one head each, whole on their ranks: all_reduce of the weight's gradient backward."""

    site: NormSite

    @property
    def size(self) -> int:
        return self.site.cut.unit

    def squares(self, x: Tensor) -> Tensor:
        return sum_squares_rows(x.t()) if self.site.is_invariant else x.square().sum(1)

    def products(self, x: Tensor) -> Tensor:
        return sum_rows(x.t()) if self.site.is_invariant else x.sum(1)

    def weight_gradient(self, terms: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        by_token = terms.reshape(x.shape[:-2].numel(), self.site.width)
        return self.site.sum_heads(by_token, dtype)


def _check(
    x: Tensor,
    weight: Tensor | None,
    site: NormSite,
    form: str,
    end: tuple[int, ...],
    wanted: tuple[int, ...],
    weight_shape: tuple[int, ...],
) -> None:
    if tuple(end) != wanted:
        raise ShapeError(
            f"{site.who or 'a norm'} on {site.axis}: x of shape {tuple(x.shape)}, but {form} ends "
            f"in {wanted} here: this rank holds {site.width} of {site.cut.size} features. Give "
            "what it holds."
        )
    if weight is not None and weight.shape != weight_shape:
        raise ShapeError(
            f"{site.who or 'a norm'} on {site.axis}: a weight of shape {tuple(weight.shape)}, but "
            f"this rank holds {weight_shape}. Give what it holds."
        )
