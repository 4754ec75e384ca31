"""Logits over a cut vocabulary: what each block of classes says, and how it is added.

A block is a leaf of the vocabulary; natively, all that a rank owns. It says a few numbers for every
row. They are gathered, and every rank puts them together in the same way.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shardproof import comm
from shardproof.comm.split import Split
from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype, widen
from shardproof.tree import add_tensors, combine

NOWHERE = -1  # place of a class that this rank has not
TOP, SUM, OWN, OFFSETS = range(4)  # what a block says of a row
_PART = 1 << 17  # elements of logits that are worked on at a time
_LOWEST = float("-inf")


@dataclass(frozen=True)
class VocabularyBlocks:
    """The blocks of a vocabulary that is cut.

    Attributes:
        split: of the vocabulary.
    """

    split: Split

    @cached_property
    def cut(self) -> Cut:
        """How the blocks of all ranks lie on the ranks, each a unit."""
        cut = self.split.cut
        if self.split.arithmetic.is_invariant:
            return Cut(cut.num_leaves, cut.leaves, cut.degree, runs=cut.runs)
        return Cut(cut.degree, cut.degree, cut.degree)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Where each of them ends in the vocabulary."""
        cut = self.split.cut
        if self.split.arithmetic.is_invariant:
            return tuple(cut.leaf(leaf).stop for leaf in range(cut.num_leaves))
        return tuple(itertools.accumulate(cut.sizes()))

    def places(self, target: Tensor) -> Tensor:
        """Where each class lies in the shard, (rows,); `NOWHERE` if it does not."""
        owned = self.split.owned
        is_elsewhere = (target < owned.start) | (target >= owned.stop)
        return (target - owned.start).masked_fill_(is_elsewhere, NOWHERE)

    def gather(self, logits: Tensor, places: Tensor | None, says: int) -> Tensor:
        """What every block says of every row, (blocks, says, rows), Replicate.

        Args:
            logits: (rows, owned), Shard(-1).
            places: (rows,), of the targets, if they are wanted.
            says: how many of the numbers are wanted.
        """
        wide = node_dtype(logits.dtype)
        mine = logits.new_zeros(len(self.split.blocks), says, logits.shape[0], dtype=wide)
        mine[:, TOP] = _LOWEST  # of a rank that has no class
        for block, where in zip(mine, self.split.blocks, strict=True):
            self._look_at(logits[:, where], block)
        if places is not None and logits.shape[1]:
            picked = logits.gather(1, places.clamp(min=0)[:, None])[:, 0].to(wide)
            mine[:, OWN] = picked.masked_fill_(places == NOWHERE, 0)
        axis, who = self.split.axis, self.split.name
        return comm.all_gather(mine, axis, dim=0, cut=self.cut, direction="forward", who=who)

    def _look_at(self, logits: Tensor, block: Tensor) -> None:
        """Fill in what one block says, (says, rows), except for the target's logit."""
        for rows in parts(logits):
            x = widen(logits[rows])
            top = x.amax(1)
            # A block of nothing but -inf has the sum 0, not exp(-inf + inf).
            shift = top.masked_fill(top == _LOWEST, 0)
            offsets = x - shift[:, None]
            block[TOP, rows] = top
            if len(block) > OFFSETS:
                block[OFFSETS, rows] = self.split.arithmetic.sum_rows(offsets.t())
            block[SUM, rows] = self.split.arithmetic.sum_rows(offsets.exp_().t())

    def normalizer(self, blocks: Tensor) -> Tensor:
        """(2, rows): the largest logit, and the log of the sum of exp(logit - largest)."""
        top = blocks[:, TOP].amax(0)
        total = self._sum_blocks(blocks[:, SUM] * (blocks[:, TOP] - top).exp_())
        return torch.stack((top, total.log_()))

    def own(self, blocks: Tensor, target: Tensor) -> Tensor:
        """The target's logit, (rows,): picked where it is, never added to zeros.

        Args:
            blocks: (blocks, 3 or 4, rows), Replicate.
            target: (rows,), Replicate; of a row that counts for nothing, any class.
        """
        stops = torch.tensor(self.stops, device=target.device)
        block = torch.bucketize(target, stops, right=True)
        return blocks[block, OWN, torch.arange(target.numel(), device=target.device)]

    def mean_offset(self, blocks: Tensor, top: Tensor) -> Tensor:
        """The mean over all classes of logit - largest, (rows,)."""
        starts = (0, *self.stops[:-1])
        sizes = [stop - start for start, stop in zip(starts, self.stops, strict=True)]
        size = blocks.new_tensor(sizes)[:, None]
        # Of a rank that has no class the largest is -inf, which 0 classes do not make 0.
        shifts = torch.where(size > 0, size * (blocks[:, TOP] - top), 0)
        return self._sum_blocks(blocks[:, OFFSETS] + shifts) / self.split.cut.size

    def sum_classes(self, grad: Tensor) -> Tensor:
        """Sum over the vocabulary in backward: (rows, owned), Shard(-1), to (rows,), Replicate."""
        wide, add = node_dtype(grad.dtype), self.split.arithmetic.sum_rows
        sums = (add(grad[:, where].t(), dtype=wide) for where in self.split.blocks)
        like = grad.new_empty(0, dtype=wide)
        return self.split.sum_blocks(sums, shape=grad.shape[:1], like=like, direction="backward")

    def _sum_blocks(self, blocks: Tensor) -> Tensor:
        """(blocks, rows) to (rows,); the blocks are given away."""
        if not self.split.arithmetic.is_invariant:
            return blocks.sum(0)
        leaves = {(leaf, leaf + 1): part for leaf, part in enumerate(blocks)}
        return combine((0, len(leaves)), leaves, add_tensors)


def parts(logits: Tensor) -> Iterator[slice]:
    """The rows in runs that stay in the cache; none where there are no elements."""
    rows, columns = logits.shape
    if columns:
        step = max(1, _PART // columns)
        yield from (slice(start, start + step) for start in range(0, rows, step))
