"""`Deferred`: a reshape that splits the cut dim into two, which is not computed until it is used.

Some code packs the query heads of one token by key-value head: (batch, 6, 1, n) becomes
(batch, 2, 3, n). Neither of the new dims alone says which rank has a head. Usually an attention
follows, which can be computed from the unpacked heads, and then the reshape back. So the tensor
keeps its source; every other use gathers it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from shardproof.cut.fallback import gathered
from shardproof.cut.tensor import CutTensor, name_of, run

_RESHAPES = frozenset(("reshape", "view"))
_ABOUT = frozenset(
    [
        getattr(Tensor, each).__get__
        for each in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_leaf")
    ]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point]
)


class Deferred(Tensor):
    """A reshape of a cut tensor that has not been computed.

    Attributes:
        source: (*), Shard(dim), the tensor that is reshaped.
    """

    source: CutTensor
    _whole: Tensor | None

    def whole(self) -> Tensor:
        """The result of the reshape, a plain tensor, Replicate.

        Comm:
            forward one all_gather of the whole shape, the first time; backward none.
        """
        if self._whole is None:
            with torch._C.DisableTorchFunctionSubclass():
                shape = tuple(self.shape)
            self._whole = gathered(Tensor.reshape, "reshape", (self.source, shape), {})
        return self._whole

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Undo the reshape, attend with the source, or compute with the gathered tensor."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name_of(func) in _RESHAPES and isinstance(args[0], Deferred) and _is_shape(args[1:]):
            return run(func, (args[0].source, *args[1:]), dict(kwargs))
        if func is F.scaled_dot_product_attention:
            attended = _attended(*args, **kwargs)
            if attended is not None:
                return attended
        return func(*tree_map(opened, args), **tree_map(opened, dict(kwargs)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an ATen operation on the gathered tensor."""
        return func(*tree_map(opened, args), **tree_map(opened, dict(kwargs or {})))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, a reshape of {self.source.spec!r})"


def defer(x: CutTensor, shape: Sequence[int]) -> Any:
    """Defer a reshape of a cut tensor.

    Args:
        x: (*), Shard(dim); it must not need a gradient.
        shape: the new shape; one size may be -1.

    Comm:
        none.
    """
    full = torch.empty(x.shape, device="meta").reshape(tuple(shape)).shape
    wrapped: Any = Tensor._make_wrapper_subclass
    deferred: Deferred = wrapped(Deferred, full, dtype=x.dtype, device=x.device)
    deferred.source, deferred._whole = x, None
    return deferred


def opened(x: Any) -> Any:
    """Gather a deferred reshape; return anything else unchanged.

    Args:
        x: any value.

    Comm:
        forward one all_gather of the whole shape, if `x` is deferred and was not gathered yet.
    """
    return x.whole() if isinstance(x, Deferred) else x


def _is_shape(args: tuple[Any, ...]) -> bool:
    return bool(args) and not isinstance(args[0], torch.dtype)


def _attended(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention of packed query heads, computed unpacked; None if they are packed otherwise."""
    if not isinstance(query, Deferred) or isinstance(key, Deferred) or isinstance(value, Deferred):
        return None
    heads, packed = query.source, tuple(query.shape)
    unpacked = (*packed[:-3], packed[-3] * packed[-2], 1, packed[-1])
    if tuple(heads.shape) != unpacked or key.shape[-3] != packed[-3]:
        return None
    if dropout_p or is_causal or enable_gqa:
        return None
    if attn_mask is not None:
        attn_mask = _unpacked(attn_mask, packed)
        if attn_mask is None:
            return None
    options = {"attn_mask": attn_mask, "scale": scale}
    operand: Any = heads
    is_grouped = packed[-3] != unpacked[-3]
    y = F.scaled_dot_product_attention(operand, key, value, enable_gqa=is_grouped, **options)
    return run(Tensor.reshape, (y, (*packed[:-1], y.shape[-1])), {})


def _unpacked(mask: Any, packed: tuple[int, ...]) -> Any:
    """The mask for unpacked heads; None if a mask of packed heads cannot be unpacked."""
    shape = (1,) * (len(packed) - mask.dim()) + tuple(mask.shape)
    if shape[-3:-1] == (1, 1):
        return mask
    if shape[-3:-1] == packed[-3:-1]:
        return mask.reshape(*shape[:-3], packed[-3] * packed[-2], 1, shape[-1])
    return None
