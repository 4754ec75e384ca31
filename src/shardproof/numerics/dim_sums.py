"""Sums over any dims in an order that depends on those dims alone, and what is made of such sums.

`total` lays summed dims that stand side by side one behind the other, and adds them by the halving
fold of `sums`; of dims that stand apart it folds the last first. So its bits know nothing of the
other dims, of strides and of threads. `expand` is its counterpart: it copies forward and sums by
`total` backward, where torch's own `expand` sums in an order of its own. Both can be differentiated
again and again.

A maximum holds in torch but for the sign of a zero: where 0.0 and -0.0 tie, the vector body picks
another one than the scalar tail. Here a maximum or a minimum that is zero is 0.0, whatever its
sign was. Plain tensors; no ranks.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.precision import widen
from shardproof.numerics.sums import sum_rows

# Up to so many blocks of so many elements are summed one by one, where they lie.
_FEW, _LARGE = 16, 4096

Dims = int | Sequence[int] | None


def total(x: Tensor, dims: Dims = None, *, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """Sum over dims.

    Args:
        x: (*), Replicate along the summed dims.
        dims: which; all if None or empty.
        keepdim: a summed dim stays, with one element.
        dtype: of the result; default that of `x`, in which bf16 and fp16 are rounded once.
    Returns:
        `x` without the summed dims; its gradient may be differentiated.
    Raises:
        ShapeError: a dim is not there, or is named twice.
    """
    if not x.is_floating_point():  # whole numbers: the order makes no difference
        return torch.sum(x, dims_of(x, dims), keepdim, dtype=dtype)
    dim_tuple = dims_of(x, dims)
    if x.requires_grad and torch.is_grad_enabled():
        y = _Total.apply(x, dim_tuple, dtype or x.dtype)
    else:
        y = _summed(x, dim_tuple, dtype or x.dtype)
    return y.reshape(kept_shape(x, dim_tuple)) if keepdim else y


def expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` repeated along dims of one element, and along new leading dims; a view.

    Args:
        x: (*), any placement.
        shape: of the result; -1 keeps a size.
    Returns:
        `shape`; backward is `total` over what was repeated.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.expand(tuple(shape))
    lead = len(shape) - x.dim()
    sizes = [
        *shape[:lead],
        *(b if a < 0 else a for a, b in zip(shape[lead:], x.shape, strict=True)),
    ]
    return x if sizes == list(x.shape) else _Expand.apply(x, tuple(sizes))


def mean(x: Tensor, dims: Dims = None, *, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """Sum over dims, divided by how many there are; NaN of none.

    Args:
        x: (*), Replicate along the summed dims.
        dims: as in `total`.
        keepdim: as there.
        dtype: as there.
    Returns:
        `x` without the summed dims.
    Raises:
        UsageError: `x` is not of a floating dtype, and no `dtype` is given.
    """
    into = dtype or x.dtype
    if not into.is_floating_point:
        raise UsageError(f"a mean of {x.dtype} is no whole number. Use x.float(), or give a dtype.")
    wide = widen(x.to(into))
    return (total(wide, dims, keepdim=keepdim) / _count(x, dims)).to(into)


def variance(
    x: Tensor, dims: Dims = None, *, correction: float = 1, keepdim: bool = False
) -> Tensor:
    """Mean of the squared distances from the mean, over `count - correction`.

    Args:
        x: (*), Replicate along the summed dims.
        dims: as in `total`.
        correction: 1 for the unbiased estimate, 0 for the mean.
        keepdim: as in `total`.
    Returns:
        `x` without the summed dims. NaN or infinity where there are no more than `correction`.
    """
    wide = widen(x)
    # Apart from rounding, the sum of the distances is 0: the mean needs no gradient of its own,
    # but a second backward needs that of the first, which is why it is not detached.
    far = wide - expand(mean(wide, dims, keepdim=True), wide.shape)
    free = max(_count(x, dims) - correction, 0)
    return (total(far * far, dims, keepdim=keepdim) / free).to(x.dtype)


def deviation(
    x: Tensor, dims: Dims = None, *, correction: float = 1, keepdim: bool = False
) -> Tensor:
    """Square root of `variance`, whose gradient is 0 where it is 0.

    Args:
        x: (*), Replicate along the summed dims.
        dims: as in `total`.
        correction: as in `variance`.
        keepdim: as in `total`.
    Returns:
        `x` without the summed dims.
    """
    squared = variance(widen(x), dims, correction=correction, keepdim=keepdim)
    return root(squared).to(x.dtype)


def root(x: Tensor) -> Tensor:
    """Square root, whose gradient is 0 where it is 0.

    Args:
        x: (*), any placement.
    Returns:
        (*), the placement of `x`.
    """
    # Torch's gradient of sqrt at 0 is infinite, and times a slope of 0 it would be NaN.
    is_zero = x == 0
    return torch.sqrt(x.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)


def largest(input: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """Maximum over dims; ties share the gradient.

    Args:
        input: (*), Replicate along those dims.
        dim: as in `total`.
        keepdim: as there.
    Returns:
        `input` without those dims; a zero has no sign.
    """
    return torch.amax(input, dims_of(input, dim), keepdim) + _zero(input)


def smallest(input: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """Minimum over dims; ties share the gradient.

    Args:
        input: (*), Replicate along those dims.
        dim: as in `total`.
        keepdim: as there.
    Returns:
        `input` without those dims; a zero has no sign.
    """
    return torch.amin(input, dims_of(input, dim), keepdim) + _zero(input)


def _zero(x: Tensor) -> float | int | bool:
    """The constant that turns -0.0 into 0.0 when it is added."""
    return 0.0 if x.is_floating_point() else x.dtype is not torch.bool and 0


def logsumexp(input: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    """log(sum(exp(x))) over dims.

    Args:
        input: (*), Replicate along the summed dims.
        dim: as in `total`.
        keepdim: as there.
    Returns:
        `input` without the summed dims; minus infinity of none.
    """
    x, wide = input, widen(input)
    dim_tuple = dims_of(x, dim)
    if not math.prod(x.shape[each] for each in dim_tuple):
        return total(x, dim_tuple, keepdim=keepdim) - math.inf
    top = torch.amax(wide.detach(), dim_tuple, True)
    top = top.masked_fill(top.isinf(), 0) + 0.0
    y = torch.log(total(torch.exp(wide - top), dim_tuple, keepdim=True)) + top
    return (y if keepdim else y.reshape(_left_shape(x, dim_tuple))).to(x.dtype)


def dims_of(x: Tensor, dims: Dims) -> tuple[int, ...]:
    """Dims in ascending order, none negative.

    Args:
        x: (*), any placement.
        dims: one, some, or all if None or empty.
    Raises:
        ShapeError: a dim is not there, or is named twice.
    """
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return tuple(range(x.dim()))
    dim_list = [dims] if isinstance(dims, int) else list(dims)
    count = max(x.dim(), 1)  # torch takes dim 0 of a number for the number
    if not all(-count <= dim < count for dim in dim_list):
        raise ShapeError(f"dim {dims} of a tensor of shape {tuple(x.shape)} is not there.")
    unique_dims = sorted({dim % count for dim in dim_list})
    if len(unique_dims) < len(dim_list):
        raise ShapeError(f"dim {dims} names one dim of a tensor {tuple(x.shape)} twice.")
    return tuple(unique_dims) if x.dim() else ()


def kept_shape(x: Tensor, dims: Sequence[int]) -> list[int]:
    """The shape of `x` with one element along `dims`.

    Args:
        x: (*), any placement.
        dims: none negative.
    """
    return [1 if dim in dims else size for dim, size in enumerate(x.shape)]


def _left_shape(x: Tensor, dims: Sequence[int]) -> list[int]:
    return [size for dim, size in enumerate(x.shape) if dim not in dims]


def _count(x: Tensor, dims: Dims) -> int:
    return math.prod(x.shape[dim] for dim in dims_of(x, dims))


def _summed(x: Tensor, dims: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Run by run of dims that stand side by side, the last first; rounded once."""
    if not dims:
        return x.to(dtype, copy=True)
    starts = [dim for dim in dims if dim - 1 not in dims]
    for start in reversed(starts):
        stop = next(dim for dim in range(start, x.dim() + 1) if dim not in dims)
        is_last = start == starts[0]
        x = _fold_run(x, start, stop, dtype if is_last else widest(x.dtype, dtype))
    return x


def _fold_run(x: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Summed over dims start to stop; which way is taken has no part in the order."""
    head, tail = x.shape[:start], x.shape[stop:]
    rows = math.prod(x.shape[start:stop])
    shape, before, behind = (*head, *tail), math.prod(head), math.prod(tail)
    if behind == 1:
        return sum_rows(x.reshape(before, rows).t(), dtype=dtype).view(shape)
    apart = x.reshape(before, rows, behind)
    if 1 < before <= _FEW and rows * behind >= _LARGE:  # a copy would cost more than calls
        return torch.stack([sum_rows(each, dtype=dtype) for each in apart]).view(shape)
    moved = apart.transpose(0, 1).reshape(rows, before * behind)
    return sum_rows(moved, dtype=dtype).view(shape)


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of all these are added: fp32 at least.

    Args:
        dtypes: of floating numbers.
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


class _Total(torch.autograd.Function):
    """Halving fold forward, expand backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.kept_shape, ctx.dtype = x.shape, kept_shape(x, dims), x.dtype
        return _summed(x, dims, dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return expand(grad_y.reshape(ctx.kept_shape).to(ctx.dtype), ctx.shape), None, None


class _Expand(torch.autograd.Function):
    """Expand forward, halving fold backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape, lead = x.shape, len(shape) - x.dim()
        ctx.repeated = tuple(
            dim for dim in range(len(shape)) if dim < lead or x.shape[dim - lead] != shape[dim]
        )
        return x.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        summed = total(grad_y, ctx.repeated) if ctx.repeated else grad_y
        return summed.reshape(ctx.shape), None
