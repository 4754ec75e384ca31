"""Powers, and what else torch rounds in another way in its scalar tail than in its vector body.

They are built of functions that hold (`elementwise` names them). A power whose exponent is no small
whole number is `exp(exponent * log(abs(x)))`, in fp64 for anything narrower, which makes the result
good to the last place; in fp64 itself the error is that of the product: some `abs(y log x)` ulp.
Zeros, signs, infinities and NaN come out as in torch. Plain tensors; no ranks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import UsageError
from shardproof.numerics.broadcasting import broadcast, in_fp32
from shardproof.numerics.elementwise import check_floating
from shardproof.numerics.precision import widen

Number = int | float

# Powers that torch computes by products, quotients and roots, with a backward of the same kind.
_PLAIN = frozenset((0, 1, 2, 3, -1))
_MOST = 16  # up to here a whole exponent is a chain of products

_LOG_OF_2 = math.log(2.0)


def power(input: Any, exponent: Any) -> Any:
    """`torch.pow`.

    Args:
        input: (*), any placement; or a number.
        exponent: (*), the placement of `input`; or a number.
    Returns:
        (*), the placement of `input`.
    """
    if not isinstance(exponent, Tensor):
        return _power_by_number(input, exponent)
    if not isinstance(input, Tensor):
        input = torch.full((), input, dtype=exponent.dtype, device=exponent.device)
    if not torch.result_type(input, exponent).is_floating_point:
        return torch.pow(input, exponent)
    return _power_of_tensors(input, exponent)


def reversed_power(input: Tensor, other: Any) -> Tensor:
    """`other ** input`.

    Args:
        input: (*), any placement.
        other: a number, or (*), the placement of `input`.
    Returns:
        (*), the placement of `input`.
    """
    return power(other, input)


def float_power(input: Any, exponent: Any) -> Tensor:
    """`torch.float_power`: `power` in fp64.

    Args:
        input: (*), any placement; or a number.
        exponent: (*), the placement of `input`; or a number.
    Returns:
        (*), the placement of `input`, fp64.
    """
    return power(_double(input), _double(exponent))


def exp2(input: Tensor) -> Tensor:
    """2 to the power of `input`.

    Args:
        input: (*), any placement.
    Returns:
        (*), the placement of `input`.
    """
    x = check_floating(input, "exp2")
    return torch.exp(x.double() * _LOG_OF_2).to(x.dtype)


def sinh(input: Tensor) -> Tensor:
    """Hyperbolic sine.

    Args:
        input: (*), any placement.
    Returns:
        (*), the placement of `input`.
    """
    x = widen(check_floating(input, "sinh"))
    return ((torch.expm1(x) - torch.expm1(-x)) * 0.5).to(input.dtype)


def cosh(input: Tensor) -> Tensor:
    """Hyperbolic cosine.

    Args:
        input: (*), any placement.
    Returns:
        (*), the placement of `input`.
    """
    x = widen(check_floating(input, "cosh"))
    return ((torch.exp(x) + torch.exp(-x)) * 0.5).to(input.dtype)


def atanh(input: Tensor) -> Tensor:
    """Inverse hyperbolic tangent.

    Args:
        input: (*), any placement.
    Returns:
        (*), the placement of `input`.
    """
    x = widen(check_floating(input, "atanh"))
    return ((torch.log1p(x) - torch.log1p(-x)) * 0.5).to(input.dtype)


def logit(input: Tensor, eps: float | None = None) -> Tensor:
    """log(x / (1 - x)), `x` held between `eps` and `1 - eps`.

    Args:
        input: (*), any placement.
        eps: none if None.
    Returns:
        (*), the placement of `input`.
    """
    x = widen(check_floating(input, "logit"))
    if eps is not None:
        x = x.clamp(eps, 1 - eps)
    return torch.log(x / (1 - x)).to(input.dtype)


def logaddexp(input: Tensor, other: Tensor) -> Tensor:
    """log(exp(input) + exp(other)).

    Args:
        input: (*), any placement.
        other: (*), the placement of `input`.
    Returns:
        (*), the placement of `input`.
    """
    return _logaddexp(input, other)


def _add_exps(input: Tensor, other: Tensor) -> Tensor:
    a, b = widen(input), widen(other)
    is_first = a > b
    top, low = torch.where(is_first, a, b), torch.where(is_first, b, a)
    gap = torch.where(top == low, torch.zeros_like(low), low - top)  # equal infinities
    # Equal operands share the gradient: half of it comes from each side.
    return (top + torch.log1p(torch.exp(gap))).to(input.dtype)


_logaddexp = broadcast(_add_exps)


def maximum(input: Tensor, other: Tensor) -> Tensor:
    """The larger of two; equal ones share the gradient, and NaN is kept.

    Args:
        input: (*), any placement.
        other: (*), the placement of `input`.
    Returns:
        (*), the placement of `input`; 0.0 of two zeros with different signs.
    """
    return _maximum(input, other)


def minimum(input: Tensor, other: Tensor) -> Tensor:
    """The smaller of two; equal ones share the gradient, and NaN is kept.

    Args:
        input: (*), any placement.
        other: (*), the placement of `input`.
    Returns:
        (*), the placement of `input`; -0.0 of two zeros with different signs.
    """
    return -_maximum(-input, -other)


class _Maximum(torch.autograd.Function):
    """Torch's maximum forward, but for the sign of two zeros; equal ones get half a gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.where((a == 0) & (b == 0), a + b, torch.maximum(a, b))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        shared = torch.where(a == b, grad_y * 0.5, grad_y)
        return shared.masked_fill(a < b, 0).to(a.dtype), shared.masked_fill(b < a, 0).to(b.dtype)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    if not torch.result_type(a, b).is_floating_point:
        return torch.maximum(a, b)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return _Maximum.apply(a.expand(shape), b.expand(shape))


_maximum = broadcast(_larger)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else float(x)


def _power_by_number(x: Any, exponent: Number) -> Any:
    if isinstance(exponent, complex) or not isinstance(x, Tensor) or x.is_complex():
        raise UsageError(f"pow: {x!r} ** {exponent!r} has no invariant form. Use real numbers.")
    if not x.is_floating_point():
        if isinstance(exponent, int):
            return torch.pow(x, exponent)
        x = x.to(torch.get_default_dtype())
    if exponent in _PLAIN:
        return torch.pow(x, exponent)
    if abs(exponent) == 0.5:
        root = in_fp32(torch.sqrt if exponent > 0 else torch.rsqrt)
        return root(x)
    if float(exponent).is_integer() and abs(exponent) <= _MOST:
        wide = _whole_power(widen(x), abs(int(exponent)))
        return (wide if exponent > 0 else wide.reciprocal()).to(x.dtype)
    return _Power.apply(x, float(exponent))


def _whole_power(x: Tensor, exponent: int) -> Tensor:
    """By squares: (x * x) * (x * x) and so on."""
    half = x if exponent < 4 else _whole_power(x, exponent // 2)
    if exponent < 4:
        return torch.pow(x, exponent)
    square = half * half
    return square * x if exponent % 2 else square


class _Power(torch.autograd.Function):
    """x ** p forward, g p x ** (p - 1) backward, for one number p."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.exponent = exponent
        fixed = torch.full((), exponent, dtype=torch.float64, device=x.device)
        return _real_power(x.double(), fixed).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        slope = power(widen(x), ctx.exponent - 1) * ctx.exponent
        return (widen(grad_y) * slope).to(x.dtype), None


class _PowerOfTensors(torch.autograd.Function):
    """x ** p forward; g p x ** (p - 1) and g y log(x) backward. Both have the shape of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: Tensor) -> Tensor:
        ctx.save_for_backward(x, exponent)
        return _real_power(x.double(), exponent.double()).to(torch.result_type(x, exponent))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, exponent = ctx.saved_tensors
        grad, wide, steep = grad_y.double(), x.double(), exponent.double()
        grad_x = grad_exponent = None
        if ctx.needs_input_grad[0]:
            slope = steep * _power_of_tensors(wide, steep - 1)
            grad_x = (grad * slope.masked_fill(steep == 0, 0)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            is_flat = (wide == 0) & (steep >= 0)
            logs = torch.log(wide.masked_fill(is_flat, 1))
            slope = _power_of_tensors(wide, steep) * logs
            grad_exponent = (grad * slope.masked_fill(is_flat, 0)).to(exponent.dtype)
        return grad_x, grad_exponent


def _apply_to_tensors(input: Tensor, exponent: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(input.shape, exponent.shape)
    return _PowerOfTensors.apply(input.expand(shape), exponent.expand(shape))


_power_of_tensors = broadcast(_apply_to_tensors)


def _real_power(x: Tensor, exponent: Tensor) -> Tensor:
    """In fp64, of both; by cases where a product with the logarithm is not the answer."""
    size = torch.exp(exponent * torch.log(x.abs()))
    is_one = (x.abs() == 1) & ((x == 1) | exponent.isinf()) | (exponent == 0)
    size = size.masked_fill(is_one, 1)
    is_whole = (exponent == exponent.floor()) & ~exponent.isnan()
    is_odd = is_whole & (exponent.abs().fmod(2) == 1)
    signed = torch.where(torch.signbit(x) & is_odd, -size, size)
    return signed.masked_fill((x < 0) & ~is_whole & ~x.isinf(), math.nan)
