"""Cross-entropy and log-softmax over a vocabulary that is cut: logits are never gathered.

Each leaf of the vocabulary says for every row its largest logit and its sum of exponentials; these
few numbers are gathered, and every rank puts them together in the same way, by the canonical tree
over the leaves. So neither the degree nor the threads change a bit.

The softmax is never kept: backward computes it again, from the logits, the largest and the log of
the sum, in parts that stay in the cache. bf16 and fp16 are computed in fp32 and rounded once.

Sources: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) for a loss on cut logits;
Milakov and Gimelshein 2018 (arXiv 1805.02867) for sums of exponentials that are rescaled.
"""

from typing import Any, NoReturn, TypedDict, Unpack

import torch
from torch import Tensor

from shardproof import comm, observing, operands
from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.errors import ShapeError, UsageError
from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype, widen
from shardproof.observing import REPLICATE, Operand, StepEvent
from shardproof.ops.class_targets import (
    Reduction,
    check_reduction,
    counting_rows,
    reduce_rows,
)
from shardproof.ops.vocabulary_blocks import NOWHERE, VocabularyBlocks, parts
from shardproof.scheme import DEFAULT_SCHEME, Scheme


class LossOptions(TypedDict, total=False):
    """What a cross-entropy counts and how it adds up.

    Attributes:
        ignore_index: rows with this target count for nothing; default -100.
        reduction: "mean" over the rows that count (the default), "sum", or "none".
        label_smoothing: share of every target that is spread evenly over all classes, 0 to 1.
        denominator: what a mean divides by, if not by the number of rows that count: a number, or
            a tensor of one element, Replicate.
    """

    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    denominator: Tensor | float | None


class _VocabCrossEntropy(torch.autograd.Function):
    """Losses of all rows from one all_gather; (softmax - target) g backward, no Comm."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, vocabulary: VocabularyBlocks, smoothing: float
    ) -> Tensor:
        places = vocabulary.places(target)
        blocks = vocabulary.gather(logits, places, 4 if smoothing else 3)
        norm = vocabulary.normalizer(blocks)
        top, log_sum = norm
        losses = (top - vocabulary.own(blocks, target.clamp(min=0))).add_(log_sum)
        if smoothing:
            uniform = (log_sum - vocabulary.mean_offset(blocks, top)).mul_(smoothing)
            losses.mul_(1 - smoothing).add_(uniform)
        ctx.split, ctx.smoothing = vocabulary.split, smoothing
        ctx.save_for_backward(logits, places, norm)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.split.axis.note(grad, who=ctx.split.name, what="gradient of the losses")
        logits, places, norm = ctx.saved_tensors
        spread = ctx.smoothing, ctx.smoothing / ctx.split.cut.size
        grad_logits = _LossGradient.apply(grad, logits, places, norm, spread)
        if observing.is_on():
            place = ctx.split.placement(1)
            inputs = [Operand("logits", logits, place)]
            output = Operand("grad_logits", grad_logits, place)
            what = "grad_logits = (softmax(logits) - target) * grad"
            observing.tell(StepEvent("loss", "backward", ctx.split.name, what, inputs, output))
        return grad_logits, None, None, None


class _LossGradient(torch.autograd.Function):
    """The gradient of the logits of a loss; depends on them, and cannot be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        logits: Tensor,
        places: Tensor,
        norm: Tensor,
        spread: tuple[float, float],
    ) -> Tensor:
        smoothing, of_each = spread
        grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        columns = places.clamp(min=0)[:, None]
        minus = norm.new_full(columns.shape, smoothing - 1)
        minus.masked_fill_(places[:, None] == NOWHERE, 0)
        for rows in parts(logits):
            p = _log_softmax(logits[rows], norm[:, rows]).exp_()
            p.scatter_add_(1, columns[rows], minus[rows])
            if smoothing:
                p.sub_(of_each)
            grad_logits[rows] = p.mul_(grad[rows, None])
        return grad_logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        _refuse_second("vocab_cross_entropy")


class _VocabLogSoftmax(torch.autograd.Function):
    """Log-softmax from one all_gather; g - softmax * (sum of g) backward, by one all_reduce."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, vocabulary: VocabularyBlocks) -> Tensor:
        norm = vocabulary.normalizer(vocabulary.gather(logits, None, 2))
        y = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in parts(logits):
            y[rows] = _log_softmax(logits[rows], norm[:, rows])
        ctx.vocabulary = vocabulary
        # Not `y`: of 16 bits, its exponential is far from the softmax.
        ctx.save_for_backward(logits, norm)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return _LogSoftmaxGradient.apply(grad_y, *ctx.saved_tensors, ctx.vocabulary), None


class _LogSoftmaxGradient(torch.autograd.Function):
    """The gradient of the logits of a log-softmax; cannot be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, grad_y: Tensor, logits: Tensor, norm: Tensor, vocabulary: VocabularyBlocks
    ) -> Tensor:
        total = vocabulary.sum_classes(grad_y)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in parts(logits):
            p = _log_softmax(logits[rows], norm[:, rows]).exp_()
            grad[rows] = torch.sub(widen(grad_y[rows]), p.mul_(total[rows, None]), out=p)
        return grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        _refuse_second("vocab_log_softmax")


def _log_softmax(logits: Tensor, norm: Tensor) -> Tensor:
    """A new tensor. Not `logits - (top + log_sum)`: rounding that sum loses digits."""
    top, log_sum = norm[:, :, None]
    return (widen(logits) - top).sub_(log_sum)


def _refuse_second(what: str) -> NoReturn:
    raise UsageError(
        f"{what} cannot be differentiated twice. Gather the logits (gather_output=True in the "
        "head) and use a loss on whole logits, or do without create_graph=True."
    )


def vocab_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    axis: Axis,
    cut: Cut,
    scheme: Scheme = DEFAULT_SCHEME,
    who: str = "vocab_cross_entropy",
    **options: Unpack[LossOptions],
) -> Tensor:
    """Negative log-likelihood of the targets under the softmax over a vocabulary that is cut.

    Args:
        logits: (rows, owned classes), Shard(-1).
        target: (rows,), Replicate. Class indices of the whole vocabulary, int64.
        axis: the axis over which the vocabulary is cut.
        cut: of the vocabulary.
        scheme: its numerics; blocks are leaves, natively ranks.
        who: a name for messages.
        options: ignore_index, reduction, label_smoothing and denominator: see `LossOptions`.
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
    reduction = options.get("reduction", "mean")
    ignore_index = options.get("ignore_index", -100)
    smoothing = options.get("label_smoothing", 0.0)
    check_reduction(reduction, who)
    if not 0 <= smoothing <= 1:
        raise UsageError(
            f"{who}: label_smoothing={smoothing} is no share. Use a number from 0 to 1."
        )
    denominator = options.get("denominator")
    denominator = _check_denominator(denominator, reduction, node_dtype(logits.dtype), who)
    counts = counting_rows(logits, target, classes=cut.size, ignore_index=ignore_index, who=who)
    comm.check_part(logits, axis, dim=1, cut=cut, is_whole=False, who=who)
    split = Split(axis, cut, scheme, who)
    axis.note(target, who=who, what="labels", whole=True)
    losses = _VocabCrossEntropy.apply(
        logits,
        target.masked_fill(~counts, NOWHERE),
        VocabularyBlocks(split),
        float(smoothing),
    )
    loss = reduce_rows(losses, counts, reduction, dtype=logits.dtype, denominator=denominator)
    if observing.is_on():
        of_logits = Operand("logits", logits, split.placement(1))
        inputs = [of_logits, Operand("target", target, REPLICATE)]
        what = "-log softmax(logits)[target], from what every block of classes says"
        output = Operand("loss", loss, REPLICATE)
        observing.tell(StepEvent("loss", "forward", who, what, inputs, output))
    axis.note_result(loss, who=who, what="loss")
    return loss


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
        axis: the axis over which the vocabulary is cut.
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
    operands.check_float(logits, who, "logits")
    if logits.dim() != 2:
        raise ShapeError(
            f"{who}: logits (rows, owned classes) wanted, got shape {tuple(logits.shape)}. Flatten "
            "leading dims first."
        )
    comm.check_part(logits, axis, dim=1, cut=cut, is_whole=False, who=who)
    return _VocabLogSoftmax.apply(logits, VocabularyBlocks(Split(axis, cut, scheme, who)))


def _check_denominator(
    denominator: Tensor | float | None, reduction: Reduction, dtype: torch.dtype, who: str
) -> Tensor | float | None:
    """The count as a divisor that does not change `dtype`."""
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
