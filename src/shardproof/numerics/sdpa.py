"""`torch.nn.functional.scaled_dot_product_attention`, head by head, by `attention_math`.

No head sees another one, and products are our own whatever the number of queries, so that a slice
along batch, heads or queries has the bits of the whole. What query heads that share a key-value
head add to its gradient is summed by a halving fold; so is the gradient of a mask that was
broadcast.
The gradients cannot be differentiated again. Plain tensors; no ranks.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.errors import ShapeError, UsageError
from shardproof.numerics import attention_math
from shardproof.numerics.attention_math import Attended, Manner
from shardproof.numerics.batched_products import product_by_head
from shardproof.numerics.dim_sums import expand, total
from shardproof.numerics.elementwise import check_floating
from shardproof.numerics.precision import widen

_OURS = 1  # as many rows have a kernel of ours wherever there is one


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    serving: tuple[int, ...] | None = None,
) -> Tensor:
    """`softmax(q k^T * scale + mask) v`.

    Args:
        query: (*, H, T, E), Shard along any dim but the last.
        key: (*, G, S, E), likewise, but Replicate along S; G is H without `enable_gqa`.
        value: (*, G, S, V), likewise.
        attn_mask: broadcastable to (*, H, T, S); True takes part, or numbers that are added.
        dropout_p: 0.
        is_causal: the first query sees the first key, and so on.
        scale: of the scores; default E ** -0.5.
        enable_gqa: runs of H / G query heads share a key-value head.
        serving: which key-value head each query head has, in any order; without gradients.
    Returns:
        (*, H, T, V). A query that may see no key gives zeros.
    Raises:
        ShapeError: the dims do not fit each other.
        UsageError: dropout, or a mask together with `is_causal`.
    """
    _check(query, attn_mask, dropout_p, is_causal, serving)
    q, k, v = query, key, value
    if is_plain := q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0]:
        q, k, v = _same_heads(q, k, v, serving)
    else:
        q, k, v = (x[(None,) * (4 - x.dim())] for x in (q, k, v))
        q, k, v = _same_heads(*_same_lead(q, k, v), serving)
    lead, (heads, queries), keys = q.shape[:-3], q.shape[-3:-1], k.shape[-2]
    if is_causal and queries != keys:
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    mask = attn_mask if attn_mask is None else _whole_mask(attn_mask, (*lead, heads, queries, keys))
    if not is_plain:
        q, k, v = (x.reshape(lead.numel(), *x.shape[-3:]) for x in (q, k, v))
    manner = Manner(
        _serving(heads, k.shape[1], enable_gqa) if serving is None else serving,
        q.shape[3] ** -0.5 if scale is None else scale,
        is_causal=is_causal and attn_mask is None,
        product=_product,
    )
    if torch.is_grad_enabled():
        if serving is not None:
            raise UsageError(
                "scaled_dot_product_attention: serving= has no gradients. Use no_grad."
            )
        y = _Attend.apply(q, k, v, mask, manner)
    else:
        y = attention_math.attend(q, k, v, mask, None, manner).out.to(q.dtype)
    if is_plain:
        return y
    shape = (*lead, heads, queries, value.shape[-1])
    return y.reshape(shape[len(shape) - max(x.dim() for x in (query, key, value)) :])


def _check(
    query: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, serving: object
) -> None:
    if serving is not None and torch.is_grad_enabled():
        raise UsageError("attention: serving= has no gradients. Use torch.no_grad().")
    check_floating(query, "scaled_dot_product_attention")
    if dropout_p:
        raise UsageError(
            f"scaled_dot_product_attention: dropout_p={dropout_p} draws from the global generator, "
            "whose numbers change with the cut. Use dropout by position, or dropout_p=0."
        )
    if is_causal and mask is not None:
        raise UsageError(
            "scaled_dot_product_attention: both attn_mask and is_causal are given. Give one mask "
            "that says both."
        )


class _Attend(torch.autograd.Function):
    """`attending.attend` forward, its parts backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, manner: Manner
    ) -> Tensor:
        result = attention_math.attend(q, k, v, mask, None, manner)
        ctx.manner, ctx.mask_dtype = manner, None if mask is None else mask.dtype
        ctx.save_for_backward(q, k, v, result.out, result.weights)
        return result.out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, weights = ctx.saved_tensors
        manner: Manner = ctx.manner
        needs_q, needs_k, needs_v, needs_mask, _ = ctx.needs_input_grad
        grad_out = widen(grad_y)
        grad_q = grad_k = grad_v = grad_mask = None
        if needs_v:
            parts = grad_out.new_empty(*q.shape[:2], k.shape[2], v.shape[3])
            attention_math.value_partials(weights, grad_out, None, manner, parts)
            grad_v = _shared(parts, v)
        if needs_q or needs_k or needs_mask:
            forward = Attended(out, weights, None)
            grad = attention_math.score_gradient(forward, grad_out, v, None, manner)
            if needs_mask:
                grad_mask = grad.to(ctx.mask_dtype)
            if needs_k:
                parts = grad_out.new_empty(*q.shape[:2], k.shape[2], k.shape[3])
                attention_math.key_partials(grad, q, manner, parts)
                grad_k = _shared(parts, k)
            if needs_q:
                grad_q = attention_math.query_gradient(grad, k, manner).to(q.dtype)
        return grad_q, grad_k, grad_v, grad_mask, None


def _product(a: Tensor, b: Tensor, *, rows: int, **options: Any) -> Tensor:
    """By our own kernels, for few rows and for many: a slice along queries has the same one."""
    return product_by_head(a, b, rows=_OURS, **options)


def _shared(parts: Tensor, like: Tensor) -> Tensor:
    """Summed over the query heads that share a key-value head."""
    groups = like.shape[1]
    if parts.shape[1] == groups:
        return parts.to(like.dtype)
    served = parts.shape[1] // groups if groups else 0
    apart = parts.reshape(parts.shape[0], groups, served, *parts.shape[2:])
    return total(apart, 2, dtype=like.dtype)


def _same_lead(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading dims alike."""
    if not (q.shape[:-3] == k.shape[:-3] == v.shape[:-3]):
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
        q, k, v = (expand(x, (*lead, *x.shape[-3:])) for x in (q, k, v))
    return q, k, v


def _same_heads(
    q: Tensor, k: Tensor, v: Tensor, serving: tuple[int, ...] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads alike, unless they are shared."""
    if serving is None and 1 in (k.shape[-3], v.shape[-3]):
        heads = q.shape[-3]
        k, v = (
            expand(x, (*x.shape[:-3], heads, *x.shape[-2:])) if x.shape[-3] == 1 else x
            for x in (k, v)
        )
    if k.shape[-3:-1] != v.shape[-3:-1] or q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"scaled_dot_product_attention: query {tuple(q.shape)}, key {tuple(k.shape)} and value "
            f"{tuple(v.shape)} do not fit each other."
        )
    return q, k, v


def _serving(heads: int, groups: int, is_shared: bool) -> tuple[int, ...]:
    """Which key-value head serves each query head."""
    if heads == groups:
        return tuple(range(heads))
    if not is_shared or not groups or heads % groups:
        raise ShapeError(
            f"scaled_dot_product_attention: {heads} query heads and {groups} key-value heads. Use "
            "enable_gqa=True, and a number that divides the other."
        )
    return tuple(head * groups // heads for head in range(heads))


def _whole_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Four dims that broadcast with (B, H, T, S); whole where its gradient is to be summed."""
    if not mask.requires_grad and len(shape) == 4 and mask.dim() <= 4:
        return mask[(None,) * (4 - mask.dim())]
    return expand(mask, shape).reshape(torch.Size(shape[:-3]).numel(), *shape[-3:])
