"""Norms of vectors, likeness, spread and products over dims, by sums in a fixed order.

The arguments are torch's. bf16 and fp16 are computed in fp32 and rounded once.
Plain tensors; no ranks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.errors import UsageError
from shardproof.numerics.broadcasting import broadcast
from shardproof.numerics.dim_sums import (
    Dims,
    deviation,
    dims_of,
    expand,
    largest,
    mean,
    root,
    smallest,
    total,
    variance,
)
from shardproof.numerics.elementwise import check_floating
from shardproof.numerics.powers import power
from shardproof.numerics.precision import widen

_mul = broadcast(torch.mul)
_sub = broadcast(torch.sub)


def vector_norm(
    x: Tensor,
    ord: Any = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Any = None,
) -> Tensor:
    """`sum(abs(x) ** ord) ** (1 / ord)` over dims; for infinities the largest and the smallest.

    Args:
        x: (*), Replicate along the summed dims.
        ord: any number; 0 counts what is not zero.
        dim: which; all if None.
        keepdim: a summed dim stays, with one element.
        dtype: what `x` is cast to first.
        out: None.
    Returns:
        `x` without the summed dims.
    """
    x = x if dtype is None else x.to(dtype)
    wide = widen(check_floating(x, "vector_norm"))
    if ord == 2:
        y = root(total(wide * wide, dim, keepdim=keepdim))
    elif ord == 1:
        y = total(wide.abs(), dim, keepdim=keepdim)
    elif ord == 0:
        y = total((wide != 0).to(wide.dtype), dim, keepdim=keepdim)
    elif ord == math.inf:
        y = largest(wide.abs(), dim, keepdim)
    elif ord == -math.inf:
        y = smallest(wide.abs(), dim, keepdim)
    else:
        y = power(total(power(wide.abs(), ord), dim, keepdim=keepdim), 1.0 / ord)
    return y.to(x.dtype)


def norm(
    input: Tensor,
    p: Any = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.norm`: of vectors; "fro" is that of all elements.

    Args:
        input: (*), Replicate along the summed dims.
        p: a number, "fro" or None.
        dim: which; all if None.
        keepdim: a summed dim stays, with one element.
        out: None.
        dtype: what `input` is cast to first.
    Returns:
        `input` without the summed dims.
    Raises:
        UsageError: the norm is one of a matrix.
    """
    if p not in ("fro", None) and not isinstance(p, int | float):
        raise UsageError(f"norm: p={p!r} is a norm of matrices, without an invariant form.")
    return vector_norm(input, 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype)


def linalg_norm(
    A: Tensor,  # noqa: N803 - torch's name
    ord: Any = None,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    out: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.linalg.norm`, where it is one of vectors.

    Args:
        A: (*), Replicate along the summed dims.
        ord: a number, or None; of matrices "fro".
        dim: which; all if None.
        keepdim: a summed dim stays, with one element.
        out: None.
        dtype: what `A` is cast to first.
    Returns:
        `A` without the summed dims.
    Raises:
        UsageError: the norm is another one of a matrix.
    """
    of_matrix = len(dims_of(A, dim)) == 2
    if ord is not None and (isinstance(ord, str) or of_matrix) and ord != "fro":
        raise UsageError(f"linalg.norm: ord={ord!r} of a matrix has no invariant form.")
    return vector_norm(A, 2 if ord in (None, "fro") else ord, dim, keepdim, dtype=dtype)


def normalize(
    input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None
) -> Tensor:
    """`x / max(norm, eps)` along a dim.

    Args:
        input: (*), Replicate along `dim`.
        p: which norm.
        dim: along which.
        eps: the least divisor.
        out: None.
    Returns:
        (*), the placement of `input`.
    """
    wide = widen(input)
    size = vector_norm(wide, p, dim, True).clamp_min(eps)
    return (wide / expand(size, wide.shape)).to(input.dtype)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """`sum(a * b) / (max(|a|, eps) * max(|b|, eps))` along a dim.

    Args:
        x1: (*), Replicate along `dim`.
        x2: broadcasts with `x1`, Replicate along `dim`.
        dim: along which.
        eps: the least length.
    Returns:
        (*), without `dim`.
    """
    shape = torch.broadcast_shapes(x1.shape, x2.shape)
    a, b = (expand(widen(x), shape) for x in (x1, x2))
    sizes = [vector_norm(x, 2, dim).clamp_min(eps) for x in (a, b)]
    return (total(a * b, dim) / (sizes[0] * sizes[1])).to(torch.result_type(x1, x2))


def pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    """Norm of `x1 - x2 + eps` along the last dim.

    Args:
        x1: (*), Replicate along the last dim.
        x2: broadcasts with `x1`, likewise.
        p: which norm.
        eps: added to each difference.
        keepdim: the last dim stays, with one element.
    Returns:
        (*), without the last dim.
    """
    return vector_norm(_sub(x1, x2) + eps, p, -1, keepdim)


def sum_form(input: Tensor, dim: Dims = None, keepdim: bool = False, **options: Any) -> Tensor:
    """`torch.sum`."""
    return total(input, options.pop("axis", dim), keepdim=keepdim, dtype=_dtype(options, "sum"))


def mean_form(input: Tensor, dim: Dims = None, keepdim: bool = False, **options: Any) -> Tensor:
    """`torch.mean`."""
    return mean(input, options.pop("axis", dim), keepdim=keepdim, dtype=_dtype(options, "mean"))


def nansum(input: Tensor, dim: Dims = None, keepdim: bool = False, **options: Any) -> Tensor:
    """`torch.nansum`."""
    return total(
        input.masked_fill(input.isnan(), 0), dim, keepdim=keepdim, dtype=_dtype(options, "nansum")
    )


def var(input: Tensor, *args: Any, **options: Any) -> Tensor:
    """`torch.var`."""
    return variance(check_floating(input, "var"), **_spread(args, options, "var"))


def std(input: Tensor, *args: Any, **options: Any) -> Tensor:
    """`torch.std`."""
    return deviation(check_floating(input, "std"), **_spread(args, options, "std"))


def var_mean(input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`torch.var_mean`."""
    arguments = _spread(args, options, "var_mean")
    return variance(input, **arguments), mean(
        input, arguments["dims"], keepdim=arguments["keepdim"]
    )


def std_mean(input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`torch.std_mean`."""
    arguments = _spread(args, options, "std_mean")
    return deviation(input, **arguments), mean(
        input, arguments["dims"], keepdim=arguments["keepdim"]
    )


def product(
    input: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Any = None,
) -> Tensor:
    """`torch.prod`, multiplied from first to last; cannot be differentiated twice.

    Args:
        input: (*), Replicate along the dim.
        dim: which; all if None.
        keepdim: the dim stays, with one element.
        dtype: what `input` is cast to first.
        out: None.
    Returns:
        `input` without the dim.
    """
    x = input if dtype is None else input.to(dtype)
    if not x.is_floating_point():
        return torch.prod(x) if dim is None else torch.prod(x, dim, keepdim)
    if dim is None:
        x, dim = x.reshape(-1), 0
    wide = widen(x) if x.dim() else widen(x).reshape(1)
    y = _Product.apply(wide.movedim(dim, 0)).to(x.dtype)
    return y.unsqueeze(dim) if keepdim and input.dim() else y


class _Product(torch.autograd.Function):
    """(n, *) to (*): scans, which hold, forward and from both sides backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.cumprod(x, 0)[-1].clone() if len(x) else x.new_ones(x.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if not len(x):
            return torch.zeros_like(x)
        one = torch.ones_like(x[:1])
        before = torch.cumprod(torch.cat([one, x[:-1]]), 0)
        behind = torch.cumprod(torch.cat([one, x[1:].flip(0)]), 0).flip(0)
        return before * behind * grad_y


def _dtype(options: dict[str, Any], who: str) -> torch.dtype | None:
    dtype = options.pop("dtype", None)
    refuse_rest(options, who)
    return dtype


def _spread(args: tuple[Any, ...], options: dict[str, Any], who: str) -> dict[str, Any]:
    """dim, unbiased or correction, keepdim, in each of the orders that torch takes."""
    rest = list(args)
    dims = None if rest and isinstance(rest[0], bool) else rest.pop(0) if rest else None
    dims = options.pop("dim", options.pop("axis", dims))
    unbiased = options.pop("unbiased", rest.pop(0) if rest else None)
    keepdim = options.pop("keepdim", rest.pop(0) if rest else False)
    correction = options.pop("correction", None)
    refuse_rest(options, who)
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    return {"dims": dims, "correction": correction, "keepdim": keepdim}


def refuse_rest(options: dict[str, Any], who: str) -> None:
    """Raise if an option is left that says anything.

    Args:
        options: what was not understood.
        who: the function.
    Raises:
        UsageError: one is not None.
    """
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{who}: {name}={value!r} has no invariant form. Leave it out.")
