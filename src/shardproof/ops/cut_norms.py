"""RMSNorm where features are cut: over all of a cut dim, and over the features of each head.

What is summed over the axis are leaves: the squares of a row (and in backward their counterpart)
where the row itself is cut, and the weight's gradient where heads are. A leaf that several ranks
hold (a key-value head) counts once, by its owner.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof import batch_leaves, operands
from shardproof.comm.split import Split
from shardproof.errors import ShapeError
from shardproof.numerics.precision import node_dtype
from shardproof.numerics.sums import sum_batch_rows
from shardproof.ops.rms_norm import RmsFormula, normalise
from shardproof.tree import sum_leaves


def sharded_rms_norm(x: Tensor, weight: Tensor | None, split: Split, formula: RmsFormula) -> Tensor:
    """RMSNorm over a dim that is cut, as OLMo 2 normalises queries and keys across heads.

    Args:
        x: (*, held), Shard(-1).
        weight: (held,), Shard(0), or None.
        split: of the normalised dim.
        formula: which RMSNorm it is.
    Returns:
        (*, held), Shard(-1); its gradient is expected to be Shard(-1).
    Raises:
        ShapeError: `x` or the weight are not what this rank holds.
    Comm:
        forward one all_reduce of squares (*); backward one all_reduce of products (*).
    """
    operands.check_float(x, split.name or "a norm")
    width = (len(split.held_indices),)
    _check(x, weight, split, "(*, held)", x.shape[-1:], width, width)
    return normalise(x, weight, formula, _AcrossRanks(split))


def head_rms_norm(x: Tensor, weight: Tensor | None, split: Split, formula: RmsFormula) -> Tensor:
    """RMSNorm over the features of each head, where heads are cut, as Qwen 3 has it.

    Args:
        x: (*, held heads, head_dim), Shard(-2).
        weight: (head_dim,), Replicate, or None.
        split: of the features of all heads (`Heads.query_cut`, `Heads.key_cut`).
        formula: which RMSNorm it is.
    Returns:
        (*, held heads, head_dim), Shard(-2); its gradient is expected to be Shard(-2).
    Raises:
        ShapeError: `x` or the weight are not what this rank holds.
    Comm:
        forward none; backward one all_reduce of grad_weight (head_dim).
    """
    operands.check_float(x, split.name or "a norm")
    size = split.cut.unit
    expected_shape = (len(split.held_indices) // size, size)
    _check(x, weight, split, "(*, held heads, head_dim)", x.shape[-2:], expected_shape, (size,))
    return normalise(x, weight, formula, _ByHead(split))


@dataclass(frozen=True)
class _AcrossRanks:
    """Rows that are cut: all_reduce of their squares forward, and of products backward."""

    split: Split

    @property
    def size(self) -> int:
        return self.split.cut.size

    def squares(self, x: Tensor) -> Tensor:
        return self._summed(x, self.split.arithmetic.sum_squares_rows, "forward")

    def products(self, x: Tensor) -> Tensor:
        return self._summed(x, self.split.arithmetic.sum_rows, "backward")

    def _summed(self, x: Tensor, add: Callable[[Tensor], Tensor], direction: str) -> Tensor:
        """(rows, held), Shard(1), to (rows,), Replicate."""
        sums = (add(x[:, at].t()) for at in self.split.blocks)
        return self.split.sum_blocks(sums, shape=x.shape[:1], like=x, direction=direction)

    def weight_gradient(self, terms: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return sum_batch_rows(terms, dtype=dtype)


@dataclass(frozen=True)
class _ByHead:
    """Rows of one head each, whole on their ranks: all_reduce of the weight's gradient backward."""

    split: Split

    @property
    def size(self) -> int:
        return self.split.cut.unit

    def squares(self, x: Tensor) -> Tensor:
        return self.split.arithmetic.sum_squares_rows(x.t())

    def products(self, x: Tensor) -> Tensor:
        return self.split.arithmetic.sum_rows(x.t())

    def weight_gradient(self, terms: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        split = self.split
        size, wide = split.cut.unit, node_dtype(dtype)
        by_token = terms.reshape(x.shape[:-2].numel(), len(split.held_indices))
        add = split.arithmetic.sum_rows

        def by_head(block: Tensor) -> Tensor:
            if split.arithmetic.is_invariant:  # tokens first, so that a leaf is summed as ever
                return add(add(block, dtype=wide).view(-1, size))
            return add(block.reshape(block.numel() // size, size))

        like = x.new_empty(0, dtype=dtype)
        batch = batch_leaves.several()
        if batch is None or not split.arithmetic.is_invariant:
            sums = (by_head(by_token[:, at]) for at in split.blocks)
            return split.sum_blocks(sums, shape=(size,), like=like, direction="backward")
        rows = batch.row_slices(by_token.shape[0], split.name)
        of_leaf = (
            torch.stack([by_head(by_token[each, at]) for each in rows]) for at in split.blocks
        )
        shape = (len(rows), size)
        totals = split.sum_blocks(of_leaf, shape=shape, like=like, direction="backward")
        return sum_leaves(totals)


def _check(
    x: Tensor,
    weight: Tensor | None,
    split: Split,
    form: str,
    last_dims: tuple[int, ...],
    expected_dims: tuple[int, ...],
    weight_shape: tuple[int, ...],
) -> None:
    name = split.name or "a norm"
    if tuple(last_dims) != expected_dims:
        raise ShapeError(
            f"{name} on {split.axis}: x of shape {tuple(x.shape)}, but {form} ends in "
            f"{expected_dims} here: this rank holds {len(split.held_indices)} of {split.cut.size} "
            "features. Give what it holds."
        )
    if weight is not None and weight.shape != weight_shape:
        raise ShapeError(
            f"{name} on {split.axis}: a weight of shape {tuple(weight.shape)}, but this rank "
            f"holds {weight_shape}. Give what it holds."
        )
