"""Softmax and norms: what goes along a dim by itself, whatever other rows there are.

Rows are moved to the last dim and made contiguous, because torch's softmax of a row in its memory
holds while that of a strided one does not. Sums along a row, and over rows in backward, are halving
folds. bf16 and fp16 are computed in fp32 and rounded once. Plain tensors; no ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import ShapeError
from shardproof.numerics import attention_math
from shardproof.numerics.broadcasting import broadcast
from shardproof.numerics.dim_sums import expand, total
from shardproof.numerics.elementwise import check_floating
from shardproof.numerics.precision import widen
from shardproof.numerics.sums import sum_squares_rows

_mul = broadcast(torch.mul)
_add = broadcast(torch.add)
_sub = broadcast(torch.sub)


def softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x), divided by its sum along a dim.

    Args:
        input: (*), Replicate along `dim`.
        dim: along which; by default as torch chooses.
        dtype: what the input is cast to first.
    Returns:
        (*), the placement of `input`.
    """
    return _along(_Softmax, input, dim, dtype)


def log_softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Logarithm of `softmax`.

    Args:
        input: (*), Replicate along `dim`.
        dim: along which; by default as torch chooses.
        dtype: what the input is cast to first.
    Returns:
        (*), the placement of `input`.
    """
    return _along(_LogSoftmax, input, dim, dtype)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dims.

    Args:
        input: (*, normalized_shape), Replicate along those dims.
        normalized_shape: the sizes of the last dims.
        weight: normalized_shape, Replicate, or None.
        bias: normalized_shape, Replicate, or None.
        eps: added to the variance.
    Returns:
        (*, normalized_shape), the placement of `input`.
    Raises:
        ShapeError: the last dims have other sizes.
    """
    x = widen(check_floating(input, "layer_norm"))
    size = _check_last(input, normalized_shape, "layer_norm")
    parameters = (None if each is None else each.reshape(-1).to(x.dtype) for each in (weight, bias))
    return (
        _RowLayerNorm.apply(_rows(x, size), *parameters, eps).reshape(input.shape).to(input.dtype)
    )


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`x / sqrt(mean(x * x) + eps) * weight` over the last dims.

    Args:
        input: (*, normalized_shape), Replicate along those dims.
        normalized_shape: the sizes of the last dims.
        weight: normalized_shape, Replicate, or None.
        eps: None for the least step of the dtype that is computed in.
    Returns:
        (*, normalized_shape), the placement of `input`.
    Raises:
        ShapeError: the last dims have other sizes.
    """
    x = widen(check_floating(input, "rms_norm"))
    size = _check_last(input, normalized_shape, "rms_norm")
    step = torch.finfo(x.dtype).eps if eps is None else eps
    flat = None if weight is None else weight.reshape(-1).to(x.dtype)
    return _RowRmsNorm.apply(_rows(x, size), flat, step).reshape(input.shape).to(input.dtype)


def centred(rows: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps)` of each row.

    Args:
        rows: (rows, n), fp32 or fp64, Replicate along n.
        eps: added to the variance.
    Returns:
        (rows, n); its gradient may be differentiated.
    """
    return _RowLayerNorm.apply(rows, None, None, eps)


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x * weight + bias`, whose gradients are summed by halving folds.

    Args:
        x: (*), fp32 or fp64.
        weight: broadcasts with `x`, or None.
        bias: broadcasts with `x`, or None.
    Returns:
        (*), of the dtype of `x`.
    """
    if weight is not None:
        x = _mul(x, weight.to(x.dtype))
    return x if bias is None else _add(x, bias.to(x.dtype))


def _rows(x: Tensor, size: int) -> Tensor:
    return x.reshape(x.numel() // size if size else x.shape[0], size)


def _check_last(x: Tensor, shape: Sequence[int], who: str) -> int:
    """How many elements a row has."""
    sizes = tuple(shape)
    if not sizes or tuple(x.shape[-len(sizes) :]) != sizes:
        raise ShapeError(
            f"{who}: normalized_shape={sizes} is not the end of {tuple(x.shape)}. Give the sizes "
            "of the last dims."
        )
    return math.prod(sizes)


def _along(function: Any, input: Tensor, dim: int | None, dtype: torch.dtype | None) -> Tensor:
    x = input if dtype is None else input.to(dtype)
    check_floating(x, "softmax")
    if not x.dim():
        return function.apply(x.reshape(1)).reshape(())
    if dim is None:  # torch's choice, of old
        dim = 0 if x.dim() in (0, 1, 3) else 1
    if dim in (-1, x.dim() - 1):
        return function.apply(x)
    return function.apply(x.transpose(dim, -1)).transpose(dim, -1)


class _Softmax(torch.autograd.Function):
    """Rows by themselves forward; p (g - sum(p g)) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = attention_math.softmax(widen(x).contiguous()).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        p, grad = widen(saved), widen(grad_y)
        summed = total(p * grad, -1, keepdim=True)
        return (p * (grad - expand(summed, grad.shape))).to(saved.dtype)


class _LogSoftmax(torch.autograd.Function):
    """Rows by themselves forward; g - exp(y) sum(g) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _log_softmax(widen(x).contiguous()).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        grad = widen(grad_y)
        summed = expand(total(grad, -1, keepdim=True), grad.shape)
        return (grad - torch.exp(widen(saved)) * summed).to(saved.dtype)


def _log_softmax(x: Tensor) -> Tensor:
    # As with softmax: on the CPU torch's own does the same to a row wherever it lies.
    if x.is_cpu or not x.shape[-1]:
        return torch.log_softmax(x, -1)
    far = x - x.amax(-1, keepdim=True)
    return far.sub_(total(torch.exp(far), -1, keepdim=True).log_())


class _RowLayerNorm(torch.autograd.Function):
    """(rows, n): (x - mean) / sqrt(variance + eps) * weight + bias forward; sums backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        size = x.shape[1]
        normed = x - total(x, 1, keepdim=True).div_(size)
        inverse = sum_squares_rows(normed.t())[:, None].div_(size).add_(eps).rsqrt_()
        normed.mul_(inverse)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, normed, inverse)
        y = normed.clone() if weight is None else normed * weight
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, normed, inverse = ctx.saved_tensors
        size = x.shape[1]
        if torch.is_grad_enabled():  # to be differentiated again: as a function of x
            far = x - expand(total(x, 1, keepdim=True) / size, x.shape)
            inverse = torch.rsqrt(total(far * far, 1, keepdim=True) / size + ctx.eps)
            normed = _mul(far, inverse)
        product = grad_y * normed
        grad_weight = total(product, 0) if ctx.needs_input_grad[1] else None
        grad_bias = total(grad_y, 0) if ctx.needs_input_grad[2] else None
        weighted = grad_y if weight is None else _mul(grad_y, weight)
        product = product if weight is None else _mul(product, weight)
        slope = total(product, 1, keepdim=True) / size
        shift = total(weighted, 1, keepdim=True) / size
        if torch.is_grad_enabled():
            grad_x = _mul(_sub(_sub(weighted, shift), _mul(normed, slope)), inverse)
        else:
            grad_x = torch.sub(weighted, shift).sub_(normed * slope).mul_(inverse)
        return grad_x, grad_weight, grad_bias, None


class _RowRmsNorm(torch.autograd.Function):
    """(rows, n): x / sqrt(mean(x x) + eps) * weight forward; sums backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        inverse = (sum_squares_rows(x.t()) / x.shape[1]).add_(eps).rsqrt_()[:, None]
        ctx.eps = eps
        ctx.save_for_backward(x, weight, inverse)
        normed = x * inverse
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        size = x.shape[1]
        if torch.is_grad_enabled():  # to be differentiated again: as a function of x
            inverse = torch.rsqrt(total(x * x, 1, keepdim=True) / size + ctx.eps)
        weighted = grad_y if weight is None else _mul(grad_y, weight)
        slope = total(weighted * x, 1, keepdim=True) * (inverse * inverse * inverse / size)
        if torch.is_grad_enabled():
            grad_x = _mul(weighted, inverse) - _mul(x, slope)
        else:
            grad_x = (weighted * inverse).sub_(x * slope)
        terms = _mul(grad_y * x, inverse) if ctx.needs_input_grad[1] else None
        return grad_x, None if terms is None else total(terms, 0), None
