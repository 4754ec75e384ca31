"""Attention cut by heads: each rank attends with its own query heads, and nothing is sent forward.

The unit is the query head at every degree. A key-value head is held by every rank that has one of
its query heads, so its gradient is a sum over ranks: taken by the canonical tree over the query
heads of its group, at degree 1 too.

Sources: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) for the cut; grouped
queries as in Ainslie et al. 2023 (arXiv 2305.13245).
"""

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof import observing, operands
from shardproof.autograd import once_differentiable
from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.attention_math import (
    Attended,
    HeadDropout,
    Manner,
    attend,
    causal_mask,
    key_partials,
    query_gradient,
    score_gradient,
    value_partials,
)
from shardproof.numerics.precision import widen
from shardproof.ops.head_split import HeadSplit
from shardproof.ops.rows import are_alike, prepared, wants_gradient, without_autocast

__all__ = ["HeadDropout", "HeadSplit", "attention"]

Gradients = tuple[Tensor | None, ...]


class AttentionOptions(TypedDict, total=False):
    """How scores become weights.

    Attributes:
        mask: broadcastable to (batch, 1, T, S), Replicate: bool, where True takes part, or numbers
            that are added to the scores; without a gradient.
        is_causal: queries are the last T of the S places, and see none behind their own.
        scale: of the scores; default head_dim ** -0.5.
        softcap: bends the scores into (-softcap, softcap), before the mask.
        dropout: of the weights; None in eval mode.
    """

    mask: Tensor | None
    is_causal: bool
    scale: float | None
    softcap: float | None
    dropout: HeadDropout | None


@dataclass(frozen=True)
class _Options:
    """`AttentionOptions` with what is not given."""

    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    dropout: HeadDropout | None = None


@dataclass(frozen=True)
class _Way:
    """The arguments that are not tensors."""

    split: HeadSplit
    manner: Manner
    dropout: HeadDropout | None


class _Attention(torch.autograd.Function):
    """Attention forward; backward, the parts of shared key-value heads are gathered."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, way: _Way
    ) -> Tensor:
        keep = _keep(q, k, way)
        result = attend(q, k, v, mask, keep, way.manner)
        y = result.out.to(q.dtype)
        ctx.way = way
        ctx.save_for_backward(q, k, v, keep, result.out, result.weights, result.bent)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Gradients:
        with without_autocast(grad_y):
            return _gradients(ctx, grad_y)


def _keep(q: Tensor, k: Tensor, way: _Way) -> Tensor | None:
    """Which weights dropout keeps: drawn once, for the way back too."""
    if way.dropout is None:
        return None
    return way.dropout.keep(way.split.owned, (q.shape[0], q.shape[2], k.shape[2]), q.device)


def _gradients(ctx: Any, grad_y: Tensor) -> Gradients:
    manner: Manner = ctx.way.manner
    q, k, v, keep, out, weights, bent = ctx.saved_tensors
    needs_q, needs_k, needs_v, *_ = ctx.needs_input_grad
    grad_out = widen(grad_y)
    grad_q = None
    # Both key-value gradients side by side, so that one collective carries them.
    shape = (needs_k + needs_v, q.shape[0], q.shape[1], k.shape[2], k.shape[3])
    partials = grad_out.new_empty(shape)
    if needs_q or needs_k:
        grad = score_gradient(Attended(out, weights, bent), grad_out, v, keep, manner)
        if needs_k:
            key_partials(grad, q, manner, partials[0])
        if needs_q:
            grad_q = query_gradient(grad, k, manner).to(q.dtype)
        del grad  # before the next one of its size
    if needs_v:
        value_partials(weights, grad_out, keep, manner, partials[-1])
    grad_k, grad_v = _key_gradients(ctx.way.split, partials, needs_k, needs_v, k.dtype)
    if observing.is_on():
        ctx.way.split.tell_backward(grad_y, {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v})
    return grad_q, grad_k, grad_v, None, None


def _key_gradients(
    split: HeadSplit, partials: Tensor, needs_k: bool, needs_v: bool, dtype: torch.dtype
) -> Gradients:
    """Rounded once, after the last addition."""
    if not (needs_k or needs_v):
        return None, None
    whole = split.key_gradients(partials).to(dtype)
    return whole[0] if needs_k else None, whole[-1] if needs_v else None


class _ServeHeads(torch.autograd.Function):
    """Key-value heads, once for each query head that they serve; their sum backward."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, split: HeadSplit) -> tuple[Tensor, Tensor]:
        ctx.split, ctx.dtype = split, k.dtype
        serving = torch.tensor(split.serving, dtype=torch.int64, device=k.device)
        return k.index_select(1, serving), v.index_select(1, serving)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> Gradients:
        needs_k, needs_v, _ = ctx.needs_input_grad
        grads = [grad for grad, is_needed in ((grad_k, needs_k), (grad_v, needs_v)) if is_needed]
        partials = torch.stack([widen(grad) for grad in grads])
        return *_key_gradients(ctx.split, partials, needs_k, needs_v, ctx.dtype), None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: HeadSplit,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """`softmax(q k^T * scale + mask) v` of the query heads that a rank owns.

    Args:
        q: (batch, owned, T, head_dim), Shard(1): the query heads that this rank owns.
        k: (batch, held, S, head_dim), Shard(1): the key-value heads that it holds.
        v: (batch, held, S, head_dim), Shard(1): likewise.
        split: axis, heads, scheme, name.
        options: see `AttentionOptions`.
    Returns:
        (batch, owned, T, head_dim), Shard(1); its gradient is expected to be Shard(1). Those of k
        and v are whole on every rank that holds the head. A query that may see no key gives zeros.
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: sizes, dtypes or devices do not fit each other, the heads or the mask.
        UsageError: an option makes no sense, or the mask wants a gradient.
    Comm:
        forward none; backward none.
        split.cut: forward none; backward one all_gather of (2 * parts, batch, S, head_dim).
    """
    attention_options = _Options(**options)
    if attention_options.mask is not None:
        split.axis.note(attention_options.mask, who=split.who, what="attention mask")
    split.arithmetic.require()
    context, q, k, v = prepared(q, k, v)
    with context:
        y = _attended(q, k, v, split, attention_options)
    if observing.is_on():
        split.tell_forward(q, k, v, y)
    return y


def _attended(q: Tensor, k: Tensor, v: Tensor, split: HeadSplit, options: _Options) -> Tensor:
    """`attention` once autocast is out of the way."""
    _check_heads(q, k, v, split, split.who or "attention")
    _check_options(q, k, options, split.who or "attention")
    mask, softcap, dropout = options.mask, options.softcap, options.dropout
    if dropout is not None and not dropout.p:
        dropout = None
    manner = Manner(
        split.serving,
        q.shape[3] ** -0.5 if options.scale is None else options.scale,
        softcap,
        options.is_causal,
        1.0 if dropout is None else dropout.scale,
        split.arithmetic.product_by_head,
    )
    if not split.arithmetic.is_invariant and softcap is None and dropout is None:
        return _fused(q, k, v, mask, split, manner)
    way = _Way(split, manner, dropout)
    if wants_gradient(q, k, v):
        return _Attention.apply(q, k, v, mask, way)
    return attend(q, k, v, mask, _keep(q, k, way), manner).out.to(q.dtype)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, split: HeadSplit, manner: Manner
) -> Tensor:
    """Torch's own attention on this rank's heads."""
    if split.cut is not None:
        k, v = _ServeHeads.apply(k, v, split)
    queries, keys = q.shape[2], k.shape[2]
    is_causal = manner.is_causal and queries > 1
    if is_causal and queries < keys:
        mask, is_causal = causal_mask(queries, keys, q.device), False
    elif mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        scale=manner.scale,
        enable_gqa=k.shape[1] != q.shape[1],  # whole groups
    )


def _check_heads(q: Tensor, k: Tensor, v: Tensor, split: HeadSplit, who: str) -> None:
    """Raise before anything is sent unless the tensors are what this rank has."""
    if any(map(operands.is_odd, (q, k, v))) or operands.is_traced():
        operands.check(who, q=q, k=k, v=v)
    if not are_alike(q, k, v):
        operands_by_name = {"q": q, "k": k, "v": v}
        dtypes_and_devices = ", ".join(
            f"{name} is {x.dtype} on {x.device}" for name, x in operands_by_name.items()
        )
        raise ShapeError(
            f"{who}: {dtypes_and_devices}, and attention takes one dtype and one device. Cast "
            "them alike, or use torch.autocast."
        )
    if q.dtype not in operands.FLOATS:
        operands.check_floating(who, q=q)
    shape = tuple(q.shape)
    size = split.heads.head_dim
    if len(shape) == 4 and k.dim() == 4 and k.shape == v.shape:
        key_shape = (shape[0], len(split.held), k.shape[2], size)
        if shape[1] == len(split.owned) and shape[3] == size and tuple(k.shape) == key_shape:
            return
    raise ShapeError(
        f"{who} on {split.axis}: q has shape {shape}, k {tuple(k.shape)} and v {tuple(v.shape)}; "
        f"this rank owns {len(split.owned)} of {split.heads.queries} query heads and holds "
        f"{len(split.held)} of {split.heads.keys} key-value heads of {size} features: q (batch, "
        f"{len(split.owned)}, T, {size}), k and v (batch, {len(split.held)}, S, {size}) wanted."
    )


def _check_options(q: Tensor, k: Tensor, options: _Options, who: str) -> None:
    mask, is_causal, softcap = options.mask, options.is_causal, options.softcap
    queries, keys = q.shape[2], k.shape[2]
    if softcap is not None and not softcap > 0:
        raise UsageError(f"{who}: softcap={softcap} is not positive. Use None for no softcap.")
    if is_causal and queries > keys:
        raise ShapeError(
            f"{who}: is_causal with {queries} queries and {keys} keys: the first queries would see "
            "none. Give at least as many keys, or a mask."
        )
    if mask is None:
        return
    if is_causal:
        raise UsageError(
            f"{who}: both a mask and is_causal are given. Give one mask that says both."
        )
    if operands.is_odd(mask):
        operands.check(who, mask=mask)
    if mask.requires_grad:
        raise UsageError(f"{who}: the mask wants a gradient, and gets none. Use mask.detach().")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UsageError(
            f"{who}: the mask is {mask.dtype}. Use bool (True takes part), or floating-point "
            "numbers that are added to the scores."
        )
    _check_mask_shape(tuple(mask.shape), (q.shape[0], 1, queries, keys), who)
    if mask.device != q.device:
        raise ShapeError(
            f"{who}: the mask is on {mask.device} and q on {q.device}. Use mask.to(q.device)."
        )


def _check_mask_shape(shape: tuple[int, ...], scores_shape: tuple[int, ...], who: str) -> None:
    if len(shape) <= 4:
        padded = (1,) * (4 - len(shape)) + shape
        if padded[1] != 1:
            raise ShapeError(
                f"{who}: the mask of shape {shape} has {padded[1]} entries along its head dim. "
                "Heads are cut over ranks and share one mask: give (batch, 1, T, S)."
            )
        if all(size in (1, full) for size, full in zip(padded, scores_shape, strict=True)):
            return
    raise ShapeError(
        f"{who}: a mask of shape {shape} cannot be broadcast to (batch, 1, T, S) = {scores_shape}."
    )
