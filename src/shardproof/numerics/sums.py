"""Sums whose order of additions depends on the shape alone: a halving fold.

The last rows are added onto the first, as many as the largest power of two below the number of
rows; then the second half onto the first, until one row is left. All additions are elementwise, so
neither a cut along the columns, nor strides, nor threads can change a bit, which they do for
`Tensor.sum`. It is also the more accurate order: the error grows with the logarithm of the rows.

fp32 and fp64 on the CPU are folded by a kernel in C where it was built, with the same bits; the
fold in torch is the definition, and does all else.

bf16 and fp16 are accumulated in fp32 and rounded once. Buffers have at most half as many rows as
the input. Gradients are copies of the incoming one: nothing is summed backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardproof import batch_leaves, c_modules, operands, operators
from shardproof.errors import ShapeError
from shardproof.numerics.precision import node_dtype
from shardproof.tree import sum_leaves

_WHO = "a sum over rows"
_IS_DOUBLE = {torch.float32: 0, torch.float64: 1}


def sum_rows(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over the first dim of a matrix.

    Args:
        x: (M, N), Replicate or Shard(1).
        dtype: of the result; default that of `x`.
    Returns:
        (N,), Replicate or Shard(0). Zeros if M is 0.
    Raises:
        ShapeError: `x` is no matrix.
    """
    if x.dim() != 2:
        raise ShapeError(
            f"sum_rows takes a matrix (M, N), got shape {tuple(x.shape)}. Use x.flatten(0, -2)."
        )
    dtype = dtype or x.dtype
    if x.requires_grad and torch.is_grad_enabled():
        return _SumRows.apply(x, dtype)
    return _row_sum(x, dtype)


def sum_batch_rows(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over the rows of a batch: by batch leaves, if the pass has several; no autograd then.

    Args:
        x: (M, N), Replicate or Shard(1); as many rows for each sample.
        dtype: of the result; default that of `x`.
    Returns:
        (N,), Replicate or Shard(0).
    """
    batch = batch_leaves.several()
    if batch is None:
        return sum_rows(x, dtype=dtype)
    at, dtype = batch.row_slices(x.shape[0], "a sum over rows"), dtype or x.dtype
    return sum_leaves(_row_sum(x[each], dtype) for each in at)


def sum_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of all elements, folded in row-major order.

    Args:
        x: (*), Replicate.
        dtype: of the result; default that of `x`.
    Returns:
        (), Replicate.
    """
    return sum_rows(x.reshape(-1, 1), dtype=dtype).view(())


def sum_squares(x: Tensor) -> Tensor:
    """Sum of the squares of all elements, folded in row-major order.

    Args:
        x: (*), Replicate, or one leaf of it.
    Returns:
        (), Replicate, or that leaf's part; fp64 for fp64, else fp32.
    """
    return _SumSquares.apply(x.reshape(-1, 1)).view(())


def sum_squares_rows(x: Tensor) -> Tensor:
    """Sum of the squares over the first dim of a matrix.

    Args:
        x: (M, N), Replicate or Shard(1).
    Returns:
        (N,), Replicate or Shard(0); fp64 for fp64, else fp32. Zeros if M is 0.
    Raises:
        ShapeError: `x` is no matrix.
    """
    if x.dim() != 2:
        raise ShapeError(
            f"sum_squares_rows takes a matrix (M, N), got shape {tuple(x.shape)}. Use "
            "x.flatten(0, -2)."
        )
    if x.requires_grad and torch.is_grad_enabled():
        return _SumSquares.apply(x)
    return _square_sum(x)


class _SumRows(torch.autograd.Function):
    """Halving fold forward, expand backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.rows, ctx.dtype = x.shape[0], x.dtype
        return _row_sum(x, dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y.to(ctx.dtype).expand(ctx.rows, -1), None


class _SumSquares(torch.autograd.Function):
    """Halving fold of the squares forward, 2 g x backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _square_sum(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (x.to(grad_y.dtype) * (2 * grad_y)).to(x.dtype)


def _square_sum(x: Tensor) -> Tensor:
    if _has_kernel(x):
        return _kernel_fold(x, is_squared=True)
    dtype = node_dtype(x.dtype)

    def square(part: Tensor) -> Tensor:
        wide = part.to(dtype)
        return wide * wide

    return _fold(x, dtype, square)


def _row_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype is dtype and _has_kernel(x):
        return _kernel_fold(x)
    return _fold(x, torch.promote_types(dtype, node_dtype(x.dtype)), lambda part: part).to(dtype)


def _has_kernel(x: Tensor) -> bool:
    return x.dtype in _IS_DOUBLE and x.is_cpu and x.numel() > 0 and c_modules.kernels() is not None


def _kernel_fold(x: Tensor, *, is_squared: bool = False) -> Tensor:
    """`_fold` in C: (M, N) -> (N,), of the squares if so told; `x` is not empty."""
    if operators.is_recorded(x):
        folded: Tensor = _fold_operator(x, is_squared)
        return folded
    if x.is_neg():  # a view whose memory has the opposite sign
        x = x.resolve_neg()
    rows, columns = x.shape
    kind, kernels = _IS_DOUBLE[x.dtype], c_modules.kernels()
    fold: Any = None if kernels is None else kernels.fold
    out = x
    try:
        if x.storage_offset():
            operands.check_freed(_WHO, x=x)
        out = x.new_empty(columns)
        fold(kind, is_squared, out.data_ptr(), rows, columns, x.data_ptr(), *x.stride())
    except operands.ERRORS as error:
        operands.explain(error, _WHO, x=x, out=out)
    return out


_fold_operator = operators.define(
    "sum_rows(Tensor x, bool is_squared) -> Tensor",
    lambda x, is_squared: x.new_empty(x.shape[1]),
)(lambda x, is_squared: _kernel_fold(x, is_squared=is_squared))


def _fold(x: Tensor, dtype: torch.dtype, lift: Callable[[Tensor], Tensor]) -> Tensor:
    """Fold the rows of `lift(x)`, (M, N) -> (N,), in `dtype`; `x` is not written."""
    rows = x.shape[0]
    if rows == 0:
        return x.new_zeros(x.shape[1:], dtype=dtype)
    if rows == 1:
        return lift(x[0]).to(dtype, copy=True)
    power = 1 << (rows - 1).bit_length() - 1  # the largest power of two below `rows`
    if rows == 2 * power:
        total = _add_onto(x[:power], x[power:], dtype, lift)
    else:  # two quarters, so that no buffer has more than half of the rows
        power //= 2
        total = _add_onto(x[:power], x[2 * power : 3 * power], dtype, lift)
        total.add_(_add_onto(x[power : 2 * power], x[3 * power :], dtype, lift))
    while power > 1:
        power //= 2
        total[:power].add_(total[power : 2 * power])
    return total[0].clone()  # alone, or it would keep the whole buffer alive


def _add_onto(
    first: Tensor, last: Tensor, dtype: torch.dtype, lift: Callable[[Tensor], Tensor]
) -> Tensor:
    """`first` as a new tensor, with the fewer rows of `last` added to its first rows."""
    total = torch.empty_like(first, dtype=dtype)  # laid out as `first`, so that reads run along
    length = last.shape[0]
    torch.add(lift(first[:length]).to(dtype), lift(last), out=total[:length])
    total[length:] = lift(first[length:])
    return total
