"""Cross-entropy and log-softmax over a vocabulary that is cut: logits are never gathered.

Each leaf of the vocabulary says for every row its largest logit and its sum of exponentials; these
few numbers are gathered, and every rank puts them together in the same way, by the canonical tree
over the leaves. So neither the degree nor the threads change a bit. Native numerics do the same
with one block per rank in the place of leaves.

The softmax is never kept: backward computes it again, from the logits, the largest and the log of
the sum, in parts that stay in the cache. bf16 and fp16 are computed in fp32 and rounded once.

Sources: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) for a loss on cut logits;
Milakov and Gimelshein 2018 (arXiv 1805.02867) for sums of exponentials that are rescaled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardproof import comm
from shardproof.autograd import once_differentiable
from shardproof.axis import Axis
from shardproof.errors import ShapeError, UsageError
from shardproof.functional.classes import (
    Reduction,
    check_reduction,
    counting_rows,
    reduce_rows,
)
from shardproof.leaves import Cut
from shardproof.numerics.elementwise import widen
from shardproof.numerics.matmul import node_dtype
from shardproof.numerics.sums import sum_rows
from shardproof.scheme import DEFAULT_SCHEME, Scheme
from shardproof.tree import add_tensors, combine, nodes_of_run

_PART = 1 << 17  # elements of logits that are worked on at a time
_NOWHERE = -1  # place of a class that this rank has not
_TOP, _SUM, _OWN, _ALL = range(4)  # what a block says of a row


@dataclass(frozen=True)
class _Site:
    """Where cut logits stand: everything that is no tensor."""

    axis: Axis
    cut: Cut
    is_invariant: bool
    who: str
    smoothing: float = 0.0

    @property
    def blocks(self) -> tuple[slice, ...]:
        """What this rank sums by itself, as it lies in the shard: leaves, or natively all."""
        if self.is_invariant:
            return self.cut.leaf_slices(self.axis.rank)
        return (slice(0, len(self.cut.owned(self.axis.rank))),)

    @property
    def block_cut(self) -> Cut:
        """How the blocks lie on the ranks, every one a unit."""
        cut = self.cut
        if not self.is_invariant:
            return Cut(cut.degree, cut.degree, cut.degree)
        return Cut(cut.num_leaves, cut.leaves, cut.degree, runs=cut.runs)

    def block_of(self, target: Tensor) -> Tensor:
        """Number of the block in which each class lies."""
        cut = self.cut
        if self.is_invariant:
            stops = [cut.leaf(leaf).stop for leaf in range(cut.num_leaves)]
        else:
            stops, last = [], 0
            for size in cut.sizes():
                last += size
                stops.append(last)
        return torch.bucketize(target, target.new_tensor(stops), right=True)

    def sum_blocks(self, blocks: Tensor) -> Tensor:
        """(blocks, rows) to (rows,)."""
        if not self.is_invariant:
            return blocks.sum(0)
        leaves = {(leaf, leaf + 1): part for leaf, part in enumerate(blocks)}
        return combine((0, len(leaves)), leaves, add_tensors)

    def sum_columns(self, x: Tensor) -> Tensor:
        """(rows, columns) of one block to (rows,)."""
        return sum_rows(x.t()) if self.is_invariant else x.sum(1)


class _VocabCrossEntropy(torch.autograd.Function):
    """Losses of all rows from one all_gather; (softmax - target) g backward, no Comm."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, site: _Site) -> Tensor:
        places = _places(target, site)
        of_blocks = _gather_blocks(logits, places, site)
        top, log_sum = _put_together(of_blocks, site)
        rows = torch.arange(target.numel(), device=target.device)
        # Picked where it is, not added to zeros: the block of a row that counts for nothing is 0.
        own = of_blocks[site.block_of(target.clamp(min=0)), _OWN, rows]
        losses = (top - own).add_(log_sum)
        if site.smoothing:
            mean = site.sum_blocks(of_blocks[:, _ALL]) / site.cut.size
            uniform = (top - mean).add_(log_sum).mul_(site.smoothing)
            losses.mul_(1 - site.smoothing).add_(uniform)
        ctx.site = site
        ctx.save_for_backward(logits, places, top, log_sum)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, places, top, log_sum = ctx.saved_tensors
        smoothing: float = ctx.site.smoothing
        grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        columns = places.clamp(min=0)[:, None]
        minus = torch.where(places == _NOWHERE, 0.0, smoothing - 1)[:, None].to(top.dtype)
        for rows in _parts(logits):
            p = _softmax(logits[rows], top[rows], log_sum[rows])
            p.scatter_add_(1, columns[rows], minus[rows])
            if smoothing:
                p.sub_(smoothing / ctx.site.cut.size)
            grad_logits[rows] = p.mul_(grad[rows, None])
        return grad_logits, None, None


class _VocabLogSoftmax(torch.autograd.Function):
    """Log-softmax from one all_gather; g - softmax * (sum of g) backward, by one all_reduce."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, site: _Site) -> Tensor:
        top, log_sum = _put_together(_gather_blocks(logits, None, site), site)
        y = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in _parts(logits):
            y[rows] = _log_softmax(logits[rows], top[rows], log_sum[rows])
        ctx.site = site
        # Not `y`: of 16 bits, its exponential is far from the softmax.
        ctx.save_for_backward(logits, top, log_sum)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        logits, top, log_sum = ctx.saved_tensors
        total = _sum_classes(grad_y, ctx.site)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in _parts(logits):
            p = _softmax(logits[rows], top[rows], log_sum[rows])
            grad[rows] = torch.sub(widen(grad_y[rows]), p.mul_(total[rows, None]), out=p)
        return grad, None


def _places(target: Tensor, site: _Site) -> Tensor:
    """Where each target lies in the shard, (rows,); `_NOWHERE` if it does not."""
    owned = site.cut.owned(site.axis.rank)
    is_elsewhere = (target < owned.start) | (target >= owned.stop)
    return (target - owned.start).masked_fill_(is_elsewhere, _NOWHERE)


def _parts(logits: Tensor) -> Iterator[slice]:
    """The rows in runs of about `_PART` elements; none where there are no elements."""
    rows, columns = logits.shape
    if columns:
        step = max(1, _PART // columns)
        yield from (slice(start, start + step) for start in range(0, rows, step))


def _gather_blocks(logits: Tensor, places: Tensor | None, site: _Site) -> Tensor:
    """What every block says of every row: (blocks, 2 to 4, rows), Replicate."""
    rows = logits.shape[0]
    says = 2 if places is None else 4 if site.smoothing else 3
    mine = logits.new_zeros(len(site.blocks), says, rows, dtype=node_dtype(logits.dtype))
    mine[:, _TOP] = float("-inf")  # of a rank that has no class
    for block, where in zip(mine, site.blocks, strict=True):
        _look_at(logits[:, where], block, site)
    if places is not None:
        here = (places != _NOWHERE).nonzero().view(-1)
        mine[:, _OWN, here] = logits[here, places[here]].to(mine.dtype)
    return comm.all_gather(
        mine, site.axis, dim=0, cut=site.block_cut, direction="forward", who=site.who
    )


def _look_at(logits: Tensor, block: Tensor, site: _Site) -> None:
    """Fill in what one block says, (2 to 4, rows), except for the target's logit."""
    for rows in _parts(logits):
        x = widen(logits[rows])
        top = x.amax(1)
        # A block of nothing but -inf has the sum 0, not exp(-inf + inf).
        shift = top.masked_fill(top == float("-inf"), 0)
        block[_TOP, rows] = top
        block[_SUM, rows] = site.sum_columns((x - shift[:, None]).exp_())
        if len(block) > _ALL:
            block[_ALL, rows] = site.sum_columns(x)


def _put_together(of_blocks: Tensor, site: _Site) -> tuple[Tensor, Tensor]:
    """The largest logit of every row, and the log of its sum of exp(logit - largest)."""
    tops = of_blocks[:, _TOP]
    top = tops.amax(0)
    sums = of_blocks[:, _SUM] * (tops - top).exp_()
    return top, site.sum_blocks(sums).log()


def _log_softmax(logits: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    """A new tensor. Not `logits - (top + log_sum)`: rounding that sum loses digits."""
    return (widen(logits) - top[:, None]).sub_(log_sum[:, None])


def _softmax(logits: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    return _log_softmax(logits, top, log_sum).exp_()


def _sum_classes(grad: Tensor, site: _Site) -> Tensor:
    """Sum over the whole vocabulary in backward: (rows, owned), Shard(-1), to (rows,)."""
    wide = node_dtype(grad.dtype)
    if not site.is_invariant:
        total = grad.sum(1, dtype=wide)
        return comm.start_all_reduce(total, site.axis, direction="backward", who=site.who).wait()
    run, count = site.cut.run(site.axis.rank), site.cut.num_leaves
    leaves = {
        (leaf, leaf + 1): sum_rows(grad[:, where].t(), dtype=wide)
        for leaf, where in zip(run, site.blocks, strict=True)
    }
    return comm.all_reduce_nodes(
        {node: combine(node, leaves, add_tensors) for node in nodes_of_run(count, run)},
        site.axis,
        cut=site.cut,
        shape=grad.shape[:1],
        like=grad.new_empty(0, dtype=wide),
        direction="backward",
        who=site.who,
    )


def vocab_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    axis: Axis,
    cut: Cut,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    denominator: Tensor | float | None = None,
    scheme: Scheme = DEFAULT_SCHEME,
    who: str = "vocab_cross_entropy",
) -> Tensor:
    """Negative log-likelihood of the targets under the softmax over a vocabulary that is cut.

    Args:
        logits: (rows, owned classes), Shard(-1).
        target: (rows,), Replicate. Class indices of the whole vocabulary, int64.
        axis: the ranks.
        cut: of the vocabulary.
        ignore_index: rows with this target count for nothing.
        reduction: "mean" over the rows that count, "sum", or "none".
        label_smoothing: share of every target that is spread evenly over all classes, 0 to 1.
        denominator: what a mean divides by, if not by the number of rows that count: a number, or
            a tensor of one element, Replicate.
        scheme: its numerics; blocks are leaves, natively ranks.
        who: a name for messages.
    Returns:
        (), or (rows,) for "none"; Replicate, in the dtype of the logits; its gradient is expected
        to be Replicate.
    Raises:
        ShapeError: the shapes do not fit each other, or the logits are not what this rank owns.
        UsageError: an option makes no sense, or a target is no class index.
    Comm:
        forward one all_gather of (blocks, 3, rows); backward none.
        label_smoothing: forward one all_gather of (blocks, 4, rows); backward none.
    """
    check_reduction(reduction, who)
    if not 0 <= label_smoothing <= 1:
        raise UsageError(
            f"{who}: label_smoothing={label_smoothing} is no share. Use a number from 0 to 1."
        )
    denominator = _check_denominator(denominator, reduction, node_dtype(logits.dtype), who)
    counts = counting_rows(logits, target, classes=cut.size, ignore_index=ignore_index, who=who)
    comm.check_part(logits, axis, dim=1, cut=cut, is_whole=False, who=who)
    site = _Site(axis, cut, scheme.is_invariant, who, float(label_smoothing))
    losses = _VocabCrossEntropy.apply(logits, target.masked_fill(~counts, _NOWHERE), site)
    return reduce_rows(losses, counts, reduction, dtype=logits.dtype, denominator=denominator)


def vocab_log_softmax(
    logits: Tensor,
    *,
    axis: Axis,
    cut: Cut,
    scheme: Scheme = DEFAULT_SCHEME,
    who: str = "vocab_log_softmax",
) -> Tensor:
    """Log-probabilities over a vocabulary that is cut, to be used for anything.

    Args:
        logits: (rows, owned classes), Shard(-1).
        axis: the ranks.
        cut: of the vocabulary.
        scheme: its numerics; blocks are leaves, natively ranks.
        who: a name for messages.
    Returns:
        (rows, owned classes), Shard(-1); its gradient is expected to be Shard(-1), whatever it is:
        nothing is taken for granted about what the log-probabilities are used for.
    Raises:
        ShapeError: the logits are not what this rank owns.
    Comm:
        forward one all_gather of (blocks, 2, rows); backward one all_reduce of (rows).
    """
    if logits.dim() != 2:
        raise ShapeError(
            f"{who}: logits (rows, owned classes) wanted, got shape {tuple(logits.shape)}. Flatten "
            "leading dims first."
        )
    comm.check_part(logits, axis, dim=1, cut=cut, is_whole=False, who=who)
    return _VocabLogSoftmax.apply(logits, _Site(axis, cut, scheme.is_invariant, who))


def _check_denominator(
    denominator: Tensor | float | None, reduction: Reduction, dtype: torch.dtype, who: str
) -> Tensor | float | None:
    """As something that divides a total of `dtype` without changing that."""
    if denominator is None:
        return None
    if reduction != "mean":
        raise UsageError(
            f"{who}: denominator={denominator} is given with reduction={reduction!r}, which "
            "divides by nothing. Use reduction='mean', or leave it out."
        )
    if not isinstance(denominator, Tensor):
        return denominator
    if denominator.numel() != 1:
        raise ShapeError(
            f"{who}: the denominator has shape {tuple(denominator.shape)}. Give one number."
        )
    return denominator.to(dtype).view(())
