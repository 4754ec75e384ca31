"""Where logits over a cut vocabulary stand: what each block of classes says, and how it is added.

A block is a leaf of the vocabulary; natively, all that a rank owns. It says a few numbers for every
row. They are gathered, and every rank puts them together in the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardproof import comm
from shardproof.axis import Axis
from shardproof.leaves import Cut
from shardproof.numerics.elementwise import widen
from shardproof.numerics.matmul import node_dtype
from shardproof.numerics.sums import sum_rows
from shardproof.observing import Placement, shard
from shardproof.scheme import Scheme
from shardproof.tree import add_run, add_tensors, combine

NOWHERE = -1  # place of a class that this rank has not
TOP, SUM, OWN, OFFSETS = range(4)  # what a block says of a row
_PART = 1 << 17  # elements of logits that are worked on at a time
_LOWEST = float("-inf")


@dataclass(frozen=True)
class VocabularySite:
    """Where logits over a cut vocabulary stand: everything that is no tensor.

    Attributes:
        axis: the ranks.
        cut: of the vocabulary.
        scheme: its numerics.
        who: a name for messages and the ledger.
        blocks: where each of this rank's blocks lies in the shard; from `cut`.
        block_cut: how the blocks of all ranks lie on the ranks, each a unit.
        stops: where each of them ends in the vocabulary.
    """

    axis: Axis
    cut: Cut
    scheme: Scheme
    who: str
    blocks: tuple[slice, ...] = field(init=False)
    block_cut: Cut = field(init=False)
    stops: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        cut, rank = self.cut, self.axis.rank
        if self.scheme.is_invariant:
            blocks = cut.leaf_slices(rank)
            block_cut = Cut(cut.num_leaves, cut.leaves, cut.degree, runs=cut.runs)
            stops = [cut.leaf(leaf).stop for leaf in range(cut.num_leaves)]
        else:
            blocks = (slice(0, len(cut.owned(rank))),)
            block_cut = Cut(cut.degree, cut.degree, cut.degree)
            sizes = cut.sizes()
            stops = [sum(sizes[: each + 1]) for each in range(cut.degree)]
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "block_cut", block_cut)
        object.__setattr__(self, "stops", tuple(stops))

    @property
    def placement(self) -> Placement:
        """How the logits lie on this rank."""
        return shard(1, self.cut.owned(self.axis.rank), self.cut.size)

    def places(self, target: Tensor) -> Tensor:
        """Where each class lies in the shard, (rows,); `NOWHERE` if it does not."""
        owned = self.cut.owned(self.axis.rank)
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
        mine = logits.new_zeros(len(self.blocks), says, logits.shape[0], dtype=wide)
        mine[:, TOP] = _LOWEST  # of a rank that has no class
        for block, where in zip(mine, self.blocks, strict=True):
            self._look_at(logits[:, where], block)
        if places is not None and logits.shape[1]:
            picked = logits.gather(1, places.clamp(min=0)[:, None])[:, 0].to(wide)
            mine[:, OWN] = picked.masked_fill_(places == NOWHERE, 0)
        return comm.all_gather(
            mine, self.axis, dim=0, cut=self.block_cut, direction="forward", who=self.who
        )

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
                block[OFFSETS, rows] = self._sum_columns(offsets)
            block[SUM, rows] = self._sum_columns(offsets.exp_())

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
        return self._sum_blocks(blocks[:, OFFSETS] + shifts) / self.cut.size

    def sum_classes(self, grad: Tensor) -> Tensor:
        """Sum over the vocabulary in backward: (rows, owned), Shard(-1), to (rows,), Replicate."""
        wide = node_dtype(grad.dtype)
        if not self.scheme.is_invariant:
            total = grad.sum(1, dtype=wide)
            return comm.start_all_reduce(
                total, self.axis, direction="backward", who=self.who
            ).wait()
        leaves = (sum_rows(grad[:, where].t(), dtype=wide) for where in self.blocks)
        return comm.all_reduce_nodes(
            add_run(leaves, self.cut.run(self.axis.rank), self.cut.num_leaves),
            self.axis,
            cut=self.cut,
            shape=grad.shape[:1],
            like=grad.new_empty(0, dtype=wide),
            direction="backward",
            who=self.who,
        )

    def _sum_columns(self, x: Tensor) -> Tensor:
        """(rows, columns) of one block to (rows,)."""
        return sum_rows(x.t()) if self.scheme.is_invariant else x.sum(1)

    def _sum_blocks(self, blocks: Tensor) -> Tensor:
        """(blocks, rows) to (rows,); the blocks are given away."""
        if not self.scheme.is_invariant:
            return blocks.sum(0)
        leaves = {(leaf, leaf + 1): part for leaf, part in enumerate(blocks)}
        return combine((0, len(leaves)), leaves, add_tensors)


def parts(logits: Tensor) -> Iterator[slice]:
    """The rows in runs that stay in the cache; none where there are no elements."""
    rows, columns = logits.shape
    if columns:
        step = max(1, _PART // columns)
        yield from (slice(start, start + step) for start in range(0, rows, step))
