"""Vocabulary-parallel embedding: every row lies on one rank, and is picked, never added.

Source: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) for the cut along the
vocabulary. There the ranks' masked lookups are added as floats, which turns -0.0 into 0.0; here
they are added as integers, so that a row arrives with its bits: all but one rank add zero bits.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof import batch_leaves, comm, observing, operands, operators
from shardproof.autograd import once_differentiable
from shardproof.comm.split import Split
from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.precision import widen
from shardproof.observing import PARTIAL, REPLICATE, Operand, StepEvent
from shardproof.tree import sum_leaves

_INTEGERS = {4: torch.int32, 8: torch.int64}
_NOWHERE = -1  # place of a row that this rank has not


def padding_row(padding_idx: int | None, size: int, who: str) -> int | None:
    """The row that gets no gradient, counted from the first.

    Args:
        padding_idx: counted from the end if negative; or None.
        size: of the vocabulary.
        who: the layer, for the message.
    Raises:
        ShapeError: there is no such row.
    """
    if padding_idx is None:
        return None
    if not -size <= padding_idx < size:
        raise ShapeError(
            f"{who}: padding_idx={padding_idx} is no row of {size}. Use 0 to {size - 1}, or None."
        )
    return padding_idx % size


def _tell_lookup(split: Split, ids: Tensor, weight: Tensor, y: Operand) -> None:
    """Tell observers that the rows which this rank owns were picked."""
    inputs = [Operand("ids", ids, REPLICATE), Operand("weight", weight, split.placement(0))]
    what = "y = the rows of the tokens; zero where another rank owns the row"
    observing.tell(StepEvent("lookup", "forward", split.name, what, inputs, y))


class _VocabEmbedding(torch.autograd.Function):
    """all_reduce of the picked rows' bits forward; the owned rows' gradients backward, no Comm."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, split: Split, padding: int | None) -> Tensor:
        ctx.split, ctx.padding = split, padding
        places = _places(ids, split)
        ctx.save_for_backward(places)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return _lookup(weight, ids, places, split)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        split: Split = ctx.split
        split.axis.note(grad_y, who=split.name, what="gradient of the output")
        (places,) = ctx.saved_tensors
        rows, columns = ctx.shape
        if ctx.padding is not None and split.owned.start <= ctx.padding < split.owned.stop:
            places = places.masked_fill(places == ctx.padding - split.owned.start, _NOWHERE)
        # Adds row by row in the order of the tokens and passes over those that are nowhere. All
        # tokens are given: on a GPU, where a token stands decides with which it is added first.
        grad_rows = widen(grad_y).reshape(places.numel(), columns)
        grad = gradient_of_table(grad_rows, places, rows).to(ctx.dtype)
        if observing.is_on():
            inputs = [Operand("grad_y", grad_y, REPLICATE)]
            output = Operand("grad_weight", grad, split.placement(0))
            what = "grad_weight = the gradients of the tokens whose row this rank owns"
            observing.tell(StepEvent("sum of rows", "backward", split.name, what, inputs, output))
        return grad, None, None, None


def gradient_of_table(grad_rows: Tensor, places: Tensor, rows: int) -> Tensor:
    """The gradients of the tokens added row by row, by batch leaves if the pass has several.

    Args:
        grad_rows: (tokens, columns).
        places: (tokens,), where each token's row lies; -1 if it does not.
        rows: of the table.
    Returns:
        (rows, columns).
    """
    batch = batch_leaves.several()
    if batch is None:
        return _add_rows(grad_rows, places, rows, _NOWHERE)
    # A leaf has few rows of the table. Only rows that some leaf has are added: the others are zero.
    taken, compact = torch.unique(places, return_inverse=True)
    nowhere = 0 if (taken[:1] == _NOWHERE).any() else _NOWHERE  # they are sorted
    total = sum_leaves(
        _add_rows(grad_rows[at], compact[at], len(taken), nowhere)
        for at in batch.row_slices(places.numel(), "the gradient of an embedding")
    )
    table = total.new_zeros(rows, total.shape[1])
    is_here = taken != _NOWHERE
    return table.index_copy_(0, taken[is_here], total[is_here])


def _add_rows(grad_rows: Tensor, places: Tensor, rows: int, nowhere: int) -> Tensor:
    """The gradients of tokens, except of those that are nowhere, added in their order."""
    return torch.ops.aten.embedding_dense_backward(grad_rows, places, rows, nowhere, False)


def _places(ids: Tensor, split: Split) -> Tensor:
    """Where each token's row lies in the shard, (tokens,) int64; `_NOWHERE` if it does not."""
    owned = split.owned
    flat = ids.reshape(-1).long()
    if split.axis.size == 1:
        return flat
    is_elsewhere = (flat < owned.start) | (flat >= owned.stop)
    return (flat - owned.start).masked_fill_(is_elsewhere, _NOWHERE)


def _lookup(weight: Tensor, ids: Tensor, places: Tensor, split: Split) -> Tensor:
    """(*, embedding_dim); a tensor of our own, no view, so that a caller may write into it."""
    shape = (*ids.shape, weight.shape[1])
    if split.axis.size == 1:
        y = weight.new_empty(shape)
        copy_rows(weight, places, y)
        if observing.is_on():
            _tell_lookup(split, ids, weight, Operand("y", y, REPLICATE))
        return y
    y = weight.new_zeros(shape)
    pick(weight, places, y)
    if observing.is_on():
        _tell_lookup(split, ids, weight, Operand("y", y, PARTIAL))
    bits = as_integers(y)
    comm.start_all_reduce(
        bits, split.axis, direction="forward", who=split.name, observed_part=y
    ).wait()
    return y


def copy_rows(weight: Tensor, places: Tensor, y: Tensor) -> None:
    """Copy rows of a table to where they are wanted.

    Args:
        weight: (rows, columns).
        places: (tokens,), where each token's row lies in `weight`.
        y: (*, columns), of as many tokens, written.
    """
    rows = y.view(places.numel(), weight.shape[1])
    if operators.is_recorded(places):  # a graph that is run with gradients has no `out=`
        rows.copy_(weight.index_select(0, places))
    else:
        torch.index_select(weight, 0, places, out=rows)


def pick(weight: Tensor, places: Tensor, y: Tensor) -> None:
    """Copy rows of a part of a table to where they are wanted.

    Args:
        weight: (held, columns).
        places: (tokens,), where each token's row lies in `weight`; -1 if it does not.
        y: (*, columns), of as many tokens; zeros, written.
    """
    rows = y.view(places.numel(), weight.shape[1])
    if operators.is_recorded(places):  # how many there are is not known then
        if weight.shape[0]:
            picked_rows = weight.index_select(0, places.clamp(min=0))
            rows.copy_(picked_rows.masked_fill_((places == _NOWHERE)[:, None], 0))
        return
    mine = (places != _NOWHERE).nonzero().view(-1)
    rows.index_copy_(0, mine, weight.index_select(0, places[mine]))


def as_integers(y: Tensor) -> Tensor:
    """The same memory as integers that every transport can add; two 16-bit numbers make one.

    Args:
        y: (*, n), contiguous.
    Returns:
        A view of `y`.
    """
    kind = _INTEGERS.get(y.element_size(), torch.uint8)
    if y.element_size() == 2 and y.shape[-1] % 2 == 0:
        kind = torch.int32
    return y.view(kind)


def vocab_embedding(
    ids: Tensor, weight: Tensor, split: Split, *, padding_idx: int | None = None
) -> Tensor:
    """Rows of a weight that is cut along the vocabulary; every bit of them, -0.0 and NaN too.

    Numerics make no difference: nothing is rounded forward, and backward adds the tokens' gradients
    in the order of the tokens. 16 bits are added in fp32 and rounded once.

    Args:
        ids: (*), Replicate. Token ids, int64 or int32.
        weight: (owned num_embeddings, embedding_dim), Shard(0).
        split: of the vocabulary.
        padding_idx: the row that gets no gradient, or None; counted from the end if negative.
    Returns:
        (*, embedding_dim), Replicate; its gradient is expected to be Replicate.
    Raises:
        ShapeError: the weight is not what this rank owns, or lies on another device than the ids,
            or there is no such padding row.
        UsageError: the ids are no integers, or one of them is outside of the vocabulary.
    Comm:
        forward one all_reduce of y (*, embedding_dim); backward none.
    """
    who = split.name or "vocab_embedding"
    padding = padding_row(padding_idx, split.cut.size, who)
    if operands.is_odd(ids) or operands.is_odd(weight) or operands.is_traced():
        operands.check(who, ids=ids, weight=weight)
    if weight.dim() != 2:
        raise ShapeError(
            f"{who}: weight (owned num_embeddings, embedding_dim) wanted, got shape "
            f"{tuple(weight.shape)}."
        )
    comm.check_part(weight, split.axis, dim=0, cut=split.cut, is_whole=False, who=who)
    ids = check_ids(ids, split.cut.size, who)
    if ids.device != weight.device:
        raise ShapeError(
            f"{who}: the ids are on {ids.device} and the weight on {weight.device}. Move the ids "
            "with ids.to(weight.device)."
        )
    split.axis.note(ids, who=who, what="token ids", whole=True)
    y: Tensor = _VocabEmbedding.apply(weight, ids, split, padding)
    split.axis.note_result(y, who=who)
    return y


def check_ids(ids: Tensor, size: int, who: str) -> Tensor:
    """Raise unless all ids are of the vocabulary; every rank has all of them, so all raise.

    Args:
        ids: (*), Replicate.
        size: of the vocabulary.
        who: the layer, for the message.
    Returns:
        (*), Replicate: the ids.
    Raises:
        UsageError: the ids are no integers, or one of them is outside of the vocabulary.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"{who}: token ids must be int64 or int32, got {ids.dtype}.")
    if ids.is_meta or not ids.numel():
        return ids
    if operators.is_recorded(ids):
        checked: Tensor = _checked_ids(ids, size, who)
        return checked
    lowest, highest = (int(bound) for bound in ids.aminmax())
    if lowest >= 0 and highest < size:
        return ids
    where = tuple(((ids < 0) | (ids >= size)).nonzero()[0].tolist())
    raise UsageError(
        f"{who}: token id {int(ids[where])} at position {where} is outside of the vocabulary of "
        f"{size}. Use 0 to {size - 1}; a tokenizer with more tokens needs a larger embedding."
    )


@operators.define(
    "check_ids(Tensor ids, int size, str who) -> Tensor", lambda ids, size, who: ids.clone()
)
def _checked_ids(ids: Tensor, size: int, who: str) -> Tensor:
    """A copy: an operator may not return what it was given."""
    return check_ids(ids, size, who).clone()
