"""Rules for operations along some dims: softmax, norms, sums, sorts.

If the cut dim is not one of these dims, each rank computes its own part. If it is, a sum is added
over the ranks in the order of the tree, a softmax exchanges its sums, and any other operation
gathers.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.cut.fallback import gathered, invariant
from shardproof.cut.tensor import CutTensor, cut_tensor, rule, run
from shardproof.errors import ShapeError
from shardproof.ops import unit_ops

# Name -> position of the argument with the dims.
_DIM = {
    **dict.fromkeys(
        (
            "softmax",
            "log_softmax",
            "softmin",
            "cumsum",
            "cumprod",
            "logcumsumexp",
            "cummax",
            "cummin",
            "_softmax",
            "_log_softmax",
        ),
        1,
    ),
    **dict.fromkeys(("sort", "argsort", "msort"), 1),
    **dict.fromkeys(("topk", "kthvalue"), 2),
    **dict.fromkeys(
        (
            "argmax",
            "argmin",
            "amax",
            "amin",
            "logsumexp",
            "var",
            "std",
            "var_mean",
            "std_mean",
            "any",
            "all",
            "prod",
            "median",
            "nanmedian",
            "mode",
            "count_nonzero",
            "aminmax",
            "nansum",
            "nanmean",
        ),
        1,
    ),
    "norm": 2,
    "renorm": 2,
    "vector_norm": 2,
    "linalg_vector_norm": 2,
    "normalize": 2,
}
_LAST = frozenset(("sort", "argsort", "topk", "kthvalue"))


def dims_of(name: str, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The dims along which an operation works, counted from the left."""
    place = _DIM[name]
    dim_argument = kwargs.get("dim", kwargs.get("axis"))
    if dim_argument is None and len(args) > place and not isinstance(args[place], bool):
        dim_argument = args[place]
    if dim_argument is None:
        if name in _LAST:
            return (x.dim() - 1,)
        if name in ("normalize", "msort"):
            return (int(name == "normalize"),)
        return tuple(range(x.dim()))
    dims = dim_argument if isinstance(dim_argument, list | tuple) else (dim_argument,)
    return tuple(each % x.dim() for each in dims) or tuple(range(x.dim()))


@rule(*_DIM)
def lines(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the operation to this rank's part, or across the cut dim."""
    x = args[0] if args else kwargs.pop("input", kwargs.pop("self", None))
    args = (x, *args[1:])
    if not isinstance(x, CutTensor) or any(isinstance(each, CutTensor) for each in args[1:]):
        return gathered(func, name, args, kwargs)
    dims = dims_of(name, x, args, kwargs)
    if x.spec.dim in dims:
        return _across(func, name, x, args, kwargs, dims)
    y = invariant(x.spec.region, func, x.who)(x.local, *args[1:], **kwargs)
    if isinstance(y, Tensor):
        return _relaid(y, x, dims)
    results = [_relaid(each, x, dims) for each in y]
    return type(y)(results) if hasattr(type(y), "n_fields") else tuple(results)


def _relaid(y: Tensor, x: CutTensor, dims: tuple[int, ...]) -> CutTensor:
    """The result of a rank's part as a cut tensor; removed dims move the cut dim."""
    dim = x.spec.dim
    if y.dim() < x.dim():
        dim -= sum(each < dim for each in dims)
    return cut_tensor(y, x.spec.of_part(y.shape, dim), x.who)


def _across(
    func: Any,
    name: str,
    x: CutTensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: tuple[int, ...],
) -> Any:
    """Apply an operation along the cut dim."""
    place = x.spec.region.place(x.spec.cut, x.who)
    if name in ("softmax", "log_softmax"):
        over = unit_ops.softmax_cut if name == "softmax" else unit_ops.log_softmax_cut
        dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        local = x.local if dtype is None else x.local.to(dtype)
        return cut_tensor(over(local, x.spec.dim, place), x.spec, x.who)
    keep = bool(kwargs.get("keepdim", False)) or any(each is True for each in args[2:])
    if name in ("amax", "amin") and len(dims) == 1:
        return unit_ops.amax_cut(x.local, x.spec.dim, place, keepdim=keep, is_min=name == "amin")
    if name in ("argmax", "argmin") and len(dims) == 1:
        return unit_ops.max_cut(x.local, x.spec.dim, place, keepdim=keep, is_min=name == "argmin")[
            1
        ]
    if name in _SPREADS or _is_length(name, args, kwargs):
        return _spread_across(name, x, args, kwargs, dims)
    return gathered(func, name, args, kwargs)


def _spread_across(
    name: str,
    x: CutTensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: tuple[int, ...],
) -> Any:
    """A variance, a standard deviation or a norm, from sums over the cut dim."""
    keep = bool(kwargs.get("keepdim", len(args) > 3 and args[3] is True))
    if name in _LENGTHS:
        y = run(Tensor.sum, (x * x, dims), {"keepdim": keep}).sqrt()
        return y if kwargs.get("dtype") is None else y.to(kwargs["dtype"])
    free: Any = kwargs.get("correction", kwargs.get("unbiased", args[2] if len(args) > 2 else 1))
    count = math.prod(x.shape[dim] for dim in dims) - (1 if free is None else int(free))
    mean = x.mean(dims, keepdim=True)
    far = x - mean
    y = run(Tensor.sum, (far * far, dims), {"keepdim": keep}) / max(count, 0)
    y = y.sqrt() if name.startswith("std") else y
    if not name.endswith("_mean"):
        return y
    return y, mean if keep else mean.reshape(y.shape)


_LENGTHS = frozenset(("norm", "vector_norm", "linalg_vector_norm"))
_SPREADS = frozenset(("var", "std", "var_mean", "std_mean"))


def _is_length(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is the 2-norm of real vectors."""
    order = kwargs.get("p", kwargs.get("ord", args[1] if len(args) > 1 else 2))
    return name in _LENGTHS and order in (2, 2.0, "fro", None) and args[0].dtype.is_floating_point


@rule("glu")
def glu(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.glu`: one half times the sigmoid of the other half."""
    x, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else -1)
    if x.shape[dim] % 2:
        raise ShapeError(f"glu halves dim {dim} of {tuple(x.shape)}, which is odd.")
    one, two = run(Tensor.chunk, (x, 2, dim), {})
    if not isinstance(one, CutTensor) and not isinstance(two, CutTensor):
        return invariant(x.spec.region, func, x.who)(torch.cat([one, two], dim), dim)
    return run(torch.mul, (one, run(torch.sigmoid, (two,), {})), {})


@rule("max", "min")
def extreme(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`max` and `min`: of two tensors, along one dim, or of all elements."""
    if len(args) > 1 and isinstance(args[1], Tensor | CutTensor):
        return run(getattr(torch, f"{name}imum"), args, kwargs)
    x = args[0]
    if len(args) == 1 and "dim" not in kwargs:
        return run(getattr(Tensor, f"a{name}"), (x,), {})
    dim = (kwargs["dim"] if "dim" in kwargs else args[1]) % x.dim()
    if dim != x.spec.dim:
        y = invariant(x.spec.region, func, x.who)(x.local, *args[1:], **kwargs)
        return type(y)([_relaid(each, x, (dim,)) for each in y])
    keep = bool(kwargs.get("keepdim", len(args) > 2 and args[2]))
    place = x.spec.region.place(x.spec.cut, x.who)
    pair = unit_ops.max_cut(x.local, dim, place, keepdim=keep, is_min=name == "min")
    return getattr(torch.return_types, name)(pair)


@rule("sum", "mean")
def total(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`sum` and `mean`: in a fixed order along whole dims, by the tree along the cut dim."""
    x = args[0]
    if not isinstance(x, CutTensor):
        return gathered(func, name, args, kwargs)
    dim_argument = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    dtype = kwargs.get("dtype")
    if isinstance(dim_argument, torch.dtype):
        dim_argument, dtype = None, dim_argument
    dims = (
        range(x.dim())
        if dim_argument is None or dim_argument == ()
        else (dim_argument if isinstance(dim_argument, list | tuple) else (dim_argument,))
    )
    keep = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
    dims = tuple(sorted(each % x.dim() for each in dims))
    if x.spec.dim not in dims:
        y = invariant(x.spec.region, func, x.who)(x.local, *args[1:], **kwargs)
        return _relaid(y, x, dims)
    local = x.local
    if dtype is not None:
        local = local.to(dtype)
    elif not local.dtype.is_floating_point and not local.dtype.is_complex and name == "sum":
        local = local.to(torch.int64)
    place = x.spec.region.place(x.spec.cut, x.who)
    rest = tuple(each for each in dims if each != x.spec.dim)
    y = unit_ops.sum_cut(local, x.spec.dim, place, keepdim=True)
    if rest:
        y = unit_ops.fold(y, rest, keepdim=True, place=place)
    if name == "mean":
        count = 1
        for each in dims:
            count *= x.shape[each]
        y = y / count
    return y if keep else y.reshape([n for dim, n in enumerate(y.shape) if dim not in dims])


@rule("layer_norm", "rms_norm")
def norm(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Norms over the last dims; if the weight is whole, its gradient is summed over ranks."""
    x, shape = args[0], args[1] if len(args) > 1 else kwargs["normalized_shape"]
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    bias = (args[3] if len(args) > 3 else kwargs.get("bias")) if name == "layer_norm" else None
    last = 4 if name == "layer_norm" else 3
    eps = args[last] if len(args) > last else kwargs.get("eps", 1e-5 if last == 4 else None)
    if not isinstance(x, CutTensor):
        return gathered(func, name, args, kwargs)
    if x.spec.dim >= x.dim() - len(shape):
        y = _normed_across(x, tuple(range(-len(shape), 0)), eps, is_centred=name == "layer_norm")
    else:
        form = invariant(x.spec.region, func, x.who)
        rest = (None, None, eps) if name == "layer_norm" else (None, eps)
        y = cut_tensor(form(x.local, tuple(shape), *rest), x.spec, x.who)
    if weight is not None:
        y = run(torch.mul, (y, weight), {})
    return y if bias is None else run(torch.add, (y, bias), {})


def _normed_across(x: Any, dims: tuple[int, ...], eps: float | None, *, is_centred: bool) -> Any:
    """A norm over the cut dim, whose statistics are summed over the ranks."""
    if is_centred:
        x = x - x.mean(dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)


# Name -> number of last dims that it uses.
_SPATIAL = {
    **{
        f"{kind}_pool{n}d": n
        for kind in ("avg", "max", "adaptive_avg", "adaptive_max", "lp")
        for n in (1, 2, 3)
    },
    **{f"max_pool{n}d_with_indices": n for n in (1, 2, 3)},
    "tril": 2,
    "triu": 2,
    "interpolate": -2,
    "upsample": -2,
}


@rule(*_SPATIAL)
def spatial(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations on the last dims only, such as interpolation and pooling."""
    x = args[0]
    count = _SPATIAL[name]
    used = x.dim() - 2 if count < 0 else count
    if not isinstance(x, CutTensor) or x.spec.dim >= x.dim() - used:
        return gathered(func, name, args, kwargs)
    dim, local = x.spec.dim, x.local
    is_empty = not local.shape[dim]
    if is_empty:  # torch refuses a tensor without channels
        local = F.pad(local, [0, 0] * (x.dim() - 1 - dim) + [0, 1])
    y = invariant(x.spec.region, func, x.who)(local, *args[1:], **kwargs)
    parts = [y] if isinstance(y, Tensor) else y
    if is_empty:
        parts = [each.narrow(dim, 0, 0) for each in parts]
    results = [cut_tensor(each, x.spec.of_part(each.shape), x.who) for each in parts]
    return results[0] if isinstance(y, Tensor) else type(y)(results)


@rule("view_as_complex", "view_as_real")
def as_complex(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`view_as_complex` and `view_as_real`."""
    x = args[0]
    if name == "view_as_complex" and x.spec.dim == x.dim() - 1:
        return gathered(func, name, args, kwargs)
    y = func(x.local)
    return cut_tensor(y, x.spec.of_part(y.shape), x.who)


@rule("pad", "constant_pad_nd")
def pad(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.pad` along dims that are not cut."""
    x, amount = args[0], args[1] if len(args) > 1 else kwargs["pad"]
    touched = {x.dim() - 1 - n // 2 for n, each in enumerate(amount) if each}
    if x.spec.dim in touched:
        return gathered(func, name, args, kwargs)
    y = func(x.local, *args[1:], **kwargs)
    return cut_tensor(y, x.spec.of_part(y.shape), x.who)
