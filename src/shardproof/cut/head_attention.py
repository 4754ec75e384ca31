"""The rule for attention: each rank attends with the query heads that it holds."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.cut.alignment import (
    broadcast,
    fitted,
    is_one_shared_unit,
    is_served,
    served,
    where_served,
    whole_or_zeros,
)
from shardproof.cut.fallback import gathered, invariant, is_cut
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor, rule
from shardproof.numerics import sdpa


def attended_with_dropout(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`F.scaled_dot_product_attention` with dropout, in the steps that its documentation gives.

    The masks of the dropout are keyed by position, in the module that calls it.
    """
    q, k, v = query, key, value
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        length, keys = q.shape[-2], k.shape[-2]
        hidden = torch.ones(length, keys, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
        else:
            scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p, training=True) @ v


def _for_groups(x: Any, spec: Spec, times: int) -> Any:
    """Repeat keys or values for the query heads of their group, cut as `spec` says."""
    if x.shape[-3] == 1:
        return x
    if not is_cut(x) or not is_served(x, spec.cut, times):
        return x.repeat_interleave(times, -3)
    shape = (*x.shape[:-3], x.shape[-3] * times, *x.shape[-2:])
    repeated_spec = spec.region.spec(shape, x.spec.dim, spec.cut)
    return cut_tensor(served(x, spec.cut, times), repeated_spec, x.who)


def _of_heads(x: Any, spec: Spec, who: str) -> Tensor:
    """The keys or values for the query heads that this rank holds."""
    if is_cut(x) and x.shape[-3] == 1:
        x = x.expand(*x.shape[:-3], spec.shape[spec.dim], *x.shape[-2:])
    shape = (*x.shape[:-3], spec.shape[spec.dim], *x.shape[-2:])
    return fitted(x, spec.region.spec(shape, spec.dim, spec.cut), who)


def _mask_of_heads(mask: Any, spec: Spec, keys: int, who: str) -> Tensor | None:
    """The part of a mask for the query heads that this rank holds."""
    if mask is None:
        return None
    return fitted(mask, spec.region.spec((*spec.shape[:-1], keys), spec.dim, spec.cut), who)


def _is_read_in_place(q: CutTensor, k: Any, v: Any) -> bool:
    """Whether shared key-value heads can be read in place, without a copy per query head."""
    if torch.is_grad_enabled() or not q.spec.region.scheme.is_invariant:
        return False
    times = q.shape[-3] // k.shape[-3] if k.shape[-3] else 0
    return (
        q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
        and k.shape[-3] == v.shape[-3] > 1
        and is_cut(k)
        and is_cut(v)
        and k.spec.cut is v.spec.cut
        and is_served(k, q.spec.cut, times)
    )


def _read_in_place(q: CutTensor, k: CutTensor, v: CutTensor, options: dict[str, Any]) -> CutTensor:
    """Attention without a gradient, in which query heads read their key-value head in place."""
    spec, who = q.spec, q.who
    serving = where_served(k, spec.cut, q.shape[-3] // k.shape[-3])
    mask = _mask_of_heads(options.pop("attn_mask", None), spec, k.shape[-2], who)
    y = sdpa.attention(q.local, k.local, v.local, mask, serving=serving, **options)
    return cut_tensor(y, spec.of_part(y.shape), who)


@rule("scaled_dot_product_attention")
def attention(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.scaled_dot_product_attention`: each rank attends with its query heads."""
    call_options = dict(
        zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)
    )
    options = {**call_options, **kwargs}
    q: Any
    k: Any
    v: Any
    q, k, v = (options.pop(each) for each in ("query", "key", "value"))
    if not isinstance(q, CutTensor) or q.spec.dim != q.dim() - 3:
        return gathered(func, name, args, kwargs)
    k, v = (
        whole_or_zeros(each) if is_cut(each) and is_one_shared_unit(each) else each
        for each in (k, v)
    )
    if any(is_cut(each) and each.spec.dim != each.dim() - 3 for each in (k, v)):
        return gathered(func, name, args, kwargs)
    if options.get("dropout_p", 0.0) > 0.0:
        return attended_with_dropout(q, k, v, **options)
    if options.pop("enable_gqa", False):
        if _is_read_in_place(q, k, v):
            return _read_in_place(q, k, v, options)
        k, v = (
            x if x.shape[-3] == 1 else _for_groups(x, q.spec, q.shape[-3] // x.shape[-3])
            for x in (k, v)
        )
    lead = broadcast(*(x.shape[:-3] for x in (q, k, v)))
    if lead != q.shape[:-3]:
        q = q.expand(*lead, *q.shape[-3:])
    spec, who = q.spec, q.who
    k, v = (_of_heads(each, spec, who) for each in (k, v))
    mask = _mask_of_heads(options.pop("attn_mask", None), spec, k.shape[-2], who)
    y = invariant(spec.region, func, who)(q.local, k, v, attn_mask=mask, **options)
    return cut_tensor(y, spec.region.spec((*spec.shape[:-1], v.shape[-1]), spec.dim, spec.cut), who)
