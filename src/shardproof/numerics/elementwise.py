"""Activations with the same bits in a full tensor and in any shard of it, whatever the threads.

Torch's fused kernels for silu, sigmoid, softplus and gelu run a vector body and a scalar tail that
round differently, and both a cut and the thread count move the tail. Here forward and backward are
built only of operations that were measured to give an element the same bits wherever it lies
(tests/test_elementwise.py and tests/test_invariance_table.py measure again): exp, log1p, erf, tanh,
relu, clamp, comparisons, where and plain arithmetic. `maximum` is not among them: it forgets the
sign of a zero in one of its two code paths.

The formulas are torch's own, operation by operation, so NaN, infinities and -0.0 come out as they
do there. (One exception: gelu(inf) is inf, as torch gives for a strided tensor; a contiguous one it
hands to another library, which gives NaN.) bf16 and fp16 are computed in fp32 and rounded once. No
temporary is larger than the fp32 input, each function saves one tensor for backward, and every
backward can be differentiated again.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from shardproof.errors import UsageError
from shardproof.numerics.precision import widen

Approximate = Literal["none", "tanh"]

_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBE = 0.044715


def relu(x: Tensor) -> Tensor:
    """max(x, 0), NaN kept. Torch's own, forward and backward: both hold.

    Args:
        x: (*), any placement.
    Returns:
        (*), the placement of `x`.
    """
    return torch.relu(check_floating(x, "relu"))


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent.

    Args:
        x: (*), any placement.
    Returns:
        (*), the placement of `x`.
    """
    return _Tanh.apply(check_floating(x, "tanh"))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)).

    Args:
        x: (*), any placement.
    Returns:
        (*), the placement of `x`.
    """
    return _Sigmoid.apply(check_floating(x, "sigmoid"))


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`.

    Args:
        x: (*), any placement.
    Returns:
        (*), the placement of `x`.
    """
    x = check_floating(x, "silu")
    return _Silu.apply(x) if x.requires_grad and torch.is_grad_enabled() else _silu(x)


def gelu(x: Tensor, approximate: Approximate = "none") -> Tensor:
    """`x * P(Z <= x)` for a standard normal Z, or its tanh approximation.

    Args:
        x: (*), any placement.
        approximate: "none" for the error function, "tanh" for the approximation.
    Returns:
        (*), the placement of `x`.
    Raises:
        UsageError: `approximate` is neither.
    """
    if approximate not in ("none", "tanh"):
        raise UsageError(f"gelu: approximate={approximate!r} is unknown. Use 'none' or 'tanh'.")
    function = _GeluErf if approximate == "none" else _GeluTanh
    return function.apply(check_floating(x, "gelu"))


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(beta x)) / beta, and x itself where beta x exceeds the threshold.

    Args:
        x: (*), any placement.
        beta: how sharp the bend is.
        threshold: where the function goes over into the identity.
    Returns:
        (*), the placement of `x`.
    """
    return _Softplus.apply(check_floating(x, "softplus"), float(beta), float(threshold))


class _Tanh(torch.autograd.Function):
    """tanh forward, g (1 - y) (1 + y) backward; saves the output.

    Not 1 - y y: that loses digits where y is near 1, which torch's kernel avoids by fusing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(widen(x)).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        y = widen(saved)
        return (widen(grad_y) * ((1 - y) * (1 + y))).to(saved.dtype)


class _Sigmoid(torch.autograd.Function):
    """1 / (1 + exp(-x)) forward, g (1 - y) y backward; saves the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _one_plus_exp_of_minus(widen(x)).reciprocal_().to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        y = widen(saved)
        return (widen(grad_y) * (1 - y) * y).to(saved.dtype)


def _silu(x: Tensor) -> Tensor:
    wide = widen(x)
    y = _one_plus_exp_of_minus(wide)
    return torch.div(wide, y, out=y).to(x.dtype)


class _Silu(torch.autograd.Function):
    """x / (1 + exp(-x)) forward, g s (1 + x (1 - s)) backward with s = sigmoid(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _silu(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        x = widen(saved)
        s = sigmoid(x)
        return (widen(grad_y) * s * (1 + x * (1 - s))).to(saved.dtype)


class _GeluErf(torch.autograd.Function):
    """x / 2 (1 + erf(x / sqrt 2)) forward, g (cdf + x pdf) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = widen(x)
        y = torch.mul(wide, _SQRT_HALF).erf_().add_(1)
        return y.mul_(wide * 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        x = widen(saved)
        cdf = 0.5 * (1 + torch.erf(x * _SQRT_HALF))
        pdf = torch.exp(x * x * -0.5) * (0.5 * _TANH_SCALE)
        return (widen(grad_y) * (cdf + x * pdf)).to(saved.dtype)


class _GeluTanh(torch.autograd.Function):
    """x / 2 (1 + tanh(u)) forward, u = sqrt(2 / pi) (x + 0.044715 x^3); the chain rule backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = widen(x)
        y = (wide * wide).mul_(wide).mul_(_TANH_CUBE).add_(wide).mul_(_TANH_SCALE)
        return y.tanh_().add_(1).mul_(wide * 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        x = widen(saved)
        square = x * x
        t = tanh((x + square * x * _TANH_CUBE) * _TANH_SCALE)
        slope = _TANH_SCALE * (1 + square * (3 * _TANH_CUBE))
        right = x * 0.5 * ((1 - t) * (1 + t)) * slope
        return (widen(grad_y) * (0.5 * (1 + t) + right)).to(saved.dtype)


class _Softplus(torch.autograd.Function):
    """log1p(exp(beta x)) / beta forward, g z / (1 + z) backward with z = exp(beta x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float, threshold: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.beta, ctx.threshold = beta, threshold
        wide = widen(x)
        scaled = wide * beta
        is_linear = scaled > threshold
        return torch.where(is_linear, wide, scaled.exp_().log1p_().div_(beta)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        grad = widen(grad_y)
        scaled = widen(saved) * ctx.beta
        # Clamped, because a second backward multiplies what `where` drops by zero: inf gives NaN.
        z = torch.exp(scaled.clamp(max=ctx.threshold))
        bent = torch.where(scaled > ctx.threshold, grad, grad * z / (z + 1))
        return bent.to(saved.dtype), None, None


def _one_plus_exp_of_minus(x: Tensor) -> Tensor:
    return torch.neg(x).exp_().add_(1)


def check_out(name: str, y: Any, out: Any) -> None:
    """Raise what torch raises of `out=` before a result is written to it.

    Args:
        name: of the function.
        y: (*), the result.
        out: (*), any placement.
    Raises:
        UsageError: there are several results, one of them wants a gradient, or `out` cannot hold
            the dtype of the result.
    """
    if isinstance(y, tuple | list) or isinstance(out, tuple | list):
        raise UsageError(f"{name}: out= of several tensors. Use the results that are returned.")
    if torch.is_grad_enabled() and (y.requires_grad or out.requires_grad):
        raise UsageError(f"{name}: out= has no gradient. Use the result that is returned.")
    if not torch.can_cast(y.dtype, out.dtype):
        raise UsageError(
            f"{name}: out= has dtype {out.dtype}, which cannot hold a result of {y.dtype}. "
            "Give one of the result's dtype."
        )


def check_floating(x: Tensor, name: str) -> Tensor:
    """`x` itself.

    Args:
        x: (*), any placement.
        name: of the function that takes it.
    Returns:
        (*), the placement of `x`.
    Raises:
        UsageError: `x` is no floating-point tensor.
    """
    if not x.is_floating_point():
        raise UsageError(f"{name} takes a floating-point tensor, got {x.dtype}. Use x.float().")
    return x
