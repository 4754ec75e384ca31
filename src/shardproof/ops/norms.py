"""RMSNorm and LayerNorm of activations that every rank holds whole.

Rows are summed, and the gradients of weight and bias are summed over rows, by halving folds
(`numerics.sums`), where torch's kernels add in an order that may move with the number of threads.
bf16 and fp16 are computed in fp32 and rounded where the model rounds; fp64 stays fp64.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardproof import operands
from shardproof.autograd import once_differentiable
from shardproof.errors import ShapeError
from shardproof.numerics.sums import sum_batch_rows, sum_rows, sum_squares_rows
from shardproof.ops.cut_norms import head_rms_norm, sharded_rms_norm
from shardproof.ops.rms_norm import RmsFormula, normalise, wide_rows
from shardproof.ops.rows import shaped
from shardproof.ops.tokens import TokenCut

__all__ = [
    "head_rms_norm",
    "layer_norm",
    "rms_norm",
    "sharded_rms_norm",
    "whole_rms_norm",
]


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float | None,
    offset: float = 0.0,
    rounds_before_weight: bool = False,
) -> Tensor:
    """`x / sqrt(mean(x * x) + eps) * (weight + offset)` over the last dim.

    Args:
        x: (*, n), Replicate.
        weight: (n,), Replicate, or None.
        eps: see `RmsFormula`, for all three options.
        offset: added to the weight.
        rounds_before_weight: where bf16 is rounded.
    Returns:
        (*, n), Replicate; its gradient is expected to be Replicate.
    Raises:
        ShapeError: the weight does not fit `x`.
        UsageError: `x` is of a kind or a dtype that is not computed with.
    Comm:
        forward none; backward none.
    """
    return whole_rms_norm(x, weight, RmsFormula(eps, offset, rounds_before_weight))


def whole_rms_norm(
    x: Tensor, weight: Tensor | None, formula: RmsFormula, tokens: TokenCut | None = None
) -> Tensor:
    """`rms_norm` by its formula.

    Args:
        x: (*, n), Replicate.
        weight: (n,), Replicate, or None.
        formula: which RMSNorm it is.
        tokens: how the tokens of `x`, (B, own tokens, n), are cut, if they are.
    Returns:
        (*, n), the placement of `x`, which its gradient is expected to have.
    Raises:
        ShapeError: the weight does not fit `x`.
        UsageError: `x` is of a kind or a dtype that is not computed with.
    Comm:
        forward none; backward none.
        tokens: backward one exchange of (*, size); backward one all_gather of (size).
    """
    _check(x, "rms_norm", weight=weight)
    return normalise(x, weight, formula, _WholeRows(x.shape[-1], tokens))


@dataclass(frozen=True)
class _WholeRows:
    """Rows whose features every rank holds whole."""

    size: int
    tokens: TokenCut | None = None

    def squares(self, x: Tensor) -> Tensor:
        return sum_squares_rows(x.t())

    def products(self, x: Tensor) -> Tensor:
        return sum_rows(x.t())

    def weight_gradient(self, terms: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _sum_rows(terms, x.shape[0], self.tokens, dtype)


def _sum_rows(terms: Tensor, batch: int, tokens: TokenCut | None, dtype: torch.dtype) -> Tensor:
    """The sum over all rows, (rows, n) to (n,)."""
    if tokens is None:
        return sum_batch_rows(terms, dtype=dtype)
    return tokens.sum_rows(terms, batch, dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    tokens: TokenCut | None = None,
) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dim.

    Args:
        x: (*, n), Replicate.
        weight: (n,), Replicate, or None.
        bias: (n,), Replicate, or None.
        eps: added to the variance.
        tokens: how the tokens of `x`, (B, own tokens, n), are cut, if they are.
    Returns:
        (*, n), the placement of `x`, which its gradient is expected to have.
    Raises:
        ShapeError: weight or bias do not fit `x`.
        UsageError: `x` is of a kind or a dtype that is not computed with.
    Comm:
        forward none; backward none.
        tokens: backward one exchange of (*, size) per parameter; backward one all_gather of (size)
        per parameter.
    """
    _check(x, "layer_norm", weight=weight, bias=bias)
    return _LayerNorm.apply(x, weight, bias, eps, tokens)


class _LayerNorm(torch.autograd.Function):
    """Rows by themselves forward; backward too, and the gradients of weight and bias summed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tokens: TokenCut | None,
    ) -> Tensor:
        wide, size = wide_rows(x), x.shape[-1]
        mean = sum_rows(wide.t()).div_(size)[:, None]
        normed = wide - mean
        inverse = sum_squares_rows(normed.t()).div_(size).add_(eps).rsqrt_()[:, None]
        normed.mul_(inverse)
        y = normed.clone() if weight is None else normed * weight
        if bias is not None:
            y = y.add_(bias)
        # One of the two is kept: the narrower, and at equal width what saves a computation.
        is_narrow = wide.dtype is not x.dtype
        ctx.save_for_backward(x if is_narrow else normed, weight, mean, inverse)
        ctx.is_narrow, ctx.bias_dtype = is_narrow, None if bias is None else bias.dtype
        ctx.tokens = tokens
        return shaped(y.to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        saved_rows, weight, mean, inverse = ctx.saved_tensors
        grad, size = wide_rows(grad_y), saved_rows.shape[-1]
        normed = (wide_rows(saved_rows) - mean).mul_(inverse) if ctx.is_narrow else saved_rows
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = _sum_rows(grad, grad_y.shape[0], ctx.tokens, ctx.bias_dtype)
        product = grad * normed
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_rows(product, grad_y.shape[0], ctx.tokens, weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = grad.clone() if weight is None else grad * weight
            if weight is not None:
                product.mul_(weight)
            mean_product = sum_rows(product.t()).div_(size)[:, None]
            mean_grad = sum_rows(weighted.t()).div_(size)[:, None]
            grad_x = weighted.sub_(mean_grad).sub_(normed * mean_product).mul_(inverse)
            grad_x = shaped(grad_x.to(grad_y.dtype), grad_y)
        return grad_x, grad_weight, grad_bias, None, None


def _check(x: Tensor, who: str, **parameters: Tensor | None) -> None:
    operands.check_float(x, who)
    for name, value in parameters.items():
        if value is not None and type(value) not in operands.PLAIN:
            operands.check(who, **{name: value})
        if value is not None and (x.dim() == 0 or value.shape != x.shape[-1:]):
            raise ShapeError(
                f"{who}: {name} of shape {tuple(value.shape)} wanted for x of shape "
                f"{tuple(x.shape)}. A norm goes over the last dim, and has one {name} for each of "
                "its elements."
            )
    if x.dim() == 0:
        raise ShapeError(f"{who}: x has no dim to go over. Give (*, n).")
