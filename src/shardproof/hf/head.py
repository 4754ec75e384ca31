"""The output head of a causal language model, whose logits stay cut until they are used."""

import functools
import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.comm.differentiable import all_gather, shard
from shardproof.errors import UsageError
from shardproof.hf.cut_logits import CutLogits
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.ops.vocabulary import vocab_cross_entropy

LOSS_TYPE = "ForCausalLM"


def summed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The losses of all next tokens, summed: transformers' mean with the divisor 1.

    Args:
        model: a causal language model of transformers, cut or not.
        tokens: (B, T), Replicate.
    Returns:
        (), Replicate.
    Comm:
        forward, backward as the model.
    """
    loss: Tensor = model(
        input_ids=tokens, labels=tokens, use_cache=False, num_items_in_batch=1
    ).loss
    return loss


class HeadState:
    """State of the current call of the model, for its head.

    Attributes:
        has_labels: whether a loss follows, which is computed from cut logits.
    """

    def __init__(self) -> None:
        self.has_labels = False


def adapt_head(model: nn.Module, head: ColumnParallelLinear) -> None:
    """Keep the logits cut for the loss, and gather them for every other use.

    With labels, `model(...).logits` are `CutLogits`, which are gathered on their first use, and the
    loss is computed from the parts. Without labels, logits are gathered at once.

    Args:
        model: a causal language model of transformers.
        head: its output head, cut along the vocabulary, without gather_output.
    """
    state = HeadState()
    head.register_forward_hook(functools.partial(_give_logits, state))
    if getattr(model, "loss_type", None) != LOSS_TYPE:
        return
    parameters = list(inspect.signature(type(model).forward).parameters)
    place = parameters.index("labels") - 1 if "labels" in parameters else -1
    model.register_forward_pre_hook(functools.partial(_begin, state, place), with_kwargs=True)
    model.register_forward_hook(functools.partial(_end, state), always_call=True)
    model.loss_function = functools.partial(_causal_loss, head)  # type: ignore[assignment]


def _begin(
    state: HeadState, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    labels = kwargs.get("labels")
    if labels is None and 0 <= place < len(args):
        labels = args[place]
    state.has_labels = labels is not None


def _end(state: HeadState, module: nn.Module, args: Any, output: Any) -> None:
    state.has_labels = False


def _give_logits(
    state: HeadState, head: ColumnParallelLinear, inputs: Any, logits: Tensor
) -> Tensor:
    """(*, owned vocabulary), Shard(-1), to (*, vocabulary), gathered now or on first use.

    Comm:
        forward one all_gather of (*, vocabulary), without labels; backward none.
    """
    if state.has_labels:
        return CutLogits.of(logits, axis=head.axis, cut=head.cut, who=head.name)
    return all_gather(
        logits, head.axis, dim=logits.dim() - 1, cut=head.cut, grad="replicate", who=head.name
    )


def _causal_loss(
    head: ColumnParallelLinear,
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The loss of transformers for a causal language model, computed from cut logits.

    Args:
        head: the head that gave the logits.
        logits: (B, T, vocabulary): `CutLogits`, or Replicate.
        labels: (B, T), Replicate; token t is compared with the logits of t - 1.
        vocab_size: size of the whole vocabulary; ignored, because the cut has it.
        num_items_in_batch: divisor of the sum; None for the number of tokens that count.
        ignore_index: label of tokens that do not count.
        shift_labels: (B, T), labels that are shifted already.
        options: arguments of other losses, which are ignored.
    Returns:
        (), Replicate, fp32 or fp64.
    Comm:
        forward one all_gather of the statistics of every leaf; backward none, for `CutLogits`; one
        all_gather of (B, T, vocabulary), for whole logits.
    """
    if shift_labels is None:
        if labels is None:
            raise UsageError(
                f"{head.name!r}: a loss needs labels or shift_labels. Give one of them."
            )
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    part = (
        logits.part
        if isinstance(logits, CutLogits)
        else shard(logits, head.axis, dim=logits.dim() - 1, cut=head.cut, who=head.name)
    )
    rows = part.reshape(target.shape[0], part.shape[-1])
    return vocab_cross_entropy(
        rows if rows.dtype.itemsize > 2 else rows.float(),
        target,
        axis=head.axis,
        cut=head.cut,
        scheme=head.scheme,
        ignore_index=ignore_index,
        reduction="mean",
        denominator=num_items_in_batch,
        who=f"{head.name}.loss",
    )
