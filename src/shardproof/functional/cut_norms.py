"""RMSNorm where features are cut: over all of a cut dim, and over the features of each head.

What is summed over the axis are leaves: the squares of a row (and in backward their counterpart)
where the row itself is cut, and the weight's gradient where heads are. A leaf that several ranks
hold (a key-value head) counts once, by its owner.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardproof import comm
from shardproof.autograd import once_differentiable
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.functional.rms import RmsFormula, wide_rows
from shardproof.functional.rows import shaped
from shardproof.leaves import Cut
from shardproof.numerics.matmul import node_dtype
from shardproof.numerics.sums import sum_rows, sum_squares_rows
from shardproof.scheme import Scheme
from shardproof.tree import Node, add_tensors, combine, nodes_of_run


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
        run = self.cut.run(self.axis.rank)
        values: dict[Node, Tensor] = {
            (leaf, leaf + 1): value for leaf, value in zip(run, leaves, strict=True)
        }
        nodes = nodes_of_run(self.cut.num_leaves, run)
        return comm.all_reduce_nodes(
            {node: combine(node, values, add_tensors) for node in nodes},
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
    _check(x, weight, site, "(*, held)", x.shape[-1:], (site.width,), (site.width,))
    return _ShardedRmsNorm.apply(x, weight, site, formula)


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
    size = site.cut.unit
    wanted = (site.width // size, size)
    _check(x, weight, site, "(*, held heads, head_dim)", x.shape[-2:], wanted, (size,))
    return _HeadRmsNorm.apply(x, weight, site, formula)


class _ShardedRmsNorm(torch.autograd.Function):
    """all_reduce of the squares forward, and of gradient times input backward; one per row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, site: NormSite, formula: RmsFormula
    ) -> Tensor:
        wide = wide_rows(x)
        squares = site.sum_features(wide, "forward", is_squared=True)
        inverse = formula.inverse(squares, site.cut.size)
        ctx.save_for_backward(x, weight, inverse)
        ctx.site, ctx.formula = site, formula
        return shaped(formula.output(wide * inverse, weight, x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        site: NormSite = ctx.site
        formula: RmsFormula = ctx.formula
        wide, grad = wide_rows(x), wide_rows(grad_y)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weighted = formula.weighted(grad, weight)
            total = site.sum_features(weighted * wide, "backward")
            grad_x = formula.input_gradient(weighted, wide, inverse, total, site.cut.size)
            grad_x = shaped(grad_x.to(x.dtype), x)
        if ctx.needs_input_grad[1]:
            terms = formula.weight_terms(grad, wide, inverse, x.dtype)
            grad_weight = sum_rows(terms, dtype=weight.dtype)
        return grad_x, grad_weight, None, None


class _HeadRmsNorm(torch.autograd.Function):
    """Heads by themselves forward; all_reduce of the weight's gradient backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, site: NormSite, formula: RmsFormula
    ) -> Tensor:
        wide = wide_rows(x)
        inverse = formula.inverse(_row_sums(wide, site, is_squared=True), x.shape[-1])
        ctx.save_for_backward(x, weight, inverse)
        ctx.site, ctx.formula = site, formula
        return shaped(formula.output(wide * inverse, weight, x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        site: NormSite = ctx.site
        formula: RmsFormula = ctx.formula
        wide, grad = wide_rows(x), wide_rows(grad_y)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            terms = formula.weight_terms(grad, wide, inverse, x.dtype)
            by_token = terms.view(x.shape[:-2].numel(), site.width)
            grad_weight = site.sum_heads(by_token, weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = formula.weighted(grad, weight)
            total = _row_sums(weighted * wide, site)
            grad_x = formula.input_gradient(weighted, wide, inverse, total, x.shape[-1])
            grad_x = shaped(grad_x.to(x.dtype), x)
        return grad_x, grad_weight, None, None


def _row_sums(x: Tensor, site: NormSite, *, is_squared: bool = False) -> Tensor:
    """(rows, n) to (rows,), on every rank by itself."""
    if not site.is_invariant:
        return (x.square() if is_squared else x).sum(1)
    return (sum_squares_rows if is_squared else sum_rows)(x.t())


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
