"""ELU, CELU, SELU, Mish and Softshrink with the same bits in a full tensor and in any shard of it.

As in `elementwise`, whose rules hold here: only operations that give an element the same bits
wherever it lies, among them expm1; torch's own formulas; one tensor saved for backward; bf16 and
fp16 computed in fp32 and rounded once; every backward can be differentiated again.

Torch's softshrink changes nothing but the sign of a zero, which its vector body loses and its
scalar tail keeps; here a zero is positive.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof.errors import UsageError
from shardproof.numerics.elementwise import check_floating, softplus, tanh
from shardproof.numerics.precision import widen

# Of Klambauer et al., arXiv 1706.02515, as torch has them.
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
# Above it, softplus is the identity.
_THRESHOLD = 20.0


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """`x` above zero, `alpha * (exp(x) - 1)` below.

    Args:
        x: (*), any placement.
        alpha: the bound below is `-alpha`.
    Returns:
        (*), the placement of `x`.
    """
    return _Elu.apply(check_floating(x, "elu"), float(alpha), 1.0, 1.0)


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """`x` above zero, `alpha * (exp(x / alpha) - 1)` below.

    Args:
        x: (*), any placement.
        alpha: the bound below is `-alpha`; not 0.
    Returns:
        (*), the placement of `x`.
    Raises:
        UsageError: `alpha` is 0.
    """
    if alpha == 0:
        raise UsageError("celu: alpha=0 divides by zero. Give another alpha, or use relu.")
    return _Elu.apply(check_floating(x, "celu"), float(alpha), 1.0, 1.0 / alpha)


def selu(x: Tensor) -> Tensor:
    """A scaled ELU that keeps mean 0 and variance 1 (Klambauer et al., arXiv 1706.02515).

    Args:
        x: (*), any placement.
    Returns:
        (*), the placement of `x`.
    """
    return _Elu.apply(check_floating(x, "selu"), _SELU_ALPHA, _SELU_SCALE, 1.0)


def mish(x: Tensor) -> Tensor:
    """`x * tanh(softplus(x))` (Misra 2019, arXiv 1908.08681).

    Args:
        x: (*), any placement.
    Returns:
        (*), the placement of `x`.
    """
    return _Mish.apply(check_floating(x, "mish"))


def softshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    """`x` moved towards zero by `lambd`, and zero where it would pass it.

    Args:
        x: (*), any placement.
        lambd: not negative.
    Returns:
        (*), the placement of `x`.
    Raises:
        UsageError: `lambd` is negative.
    """
    if not lambd >= 0:
        raise UsageError(f"softshrink: lambd={lambd} is negative. Use 0 or more.")
    return _Softshrink.apply(check_floating(x, "softshrink"), float(lambd))


class _Elu(torch.autograd.Function):
    """scale (x, or alpha expm1(x inner)) forward; g scale (1, or alpha inner exp(x inner))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, scale: float, inner: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha, ctx.scale, ctx.inner = alpha, scale, inner
        wide = widen(x)
        bent = (wide * inner).expm1_().mul_(alpha * scale)
        return torch.where(wide < 0, bent, wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        x, grad = widen(saved), widen(grad_y)
        # Clamped, because a second backward multiplies what `where` drops by zero: inf gives NaN.
        z = torch.exp(x.clamp(max=0.0) * ctx.inner)
        bent = grad * ctx.inner * (ctx.alpha * ctx.scale) * z
        return torch.where(x > 0, grad * ctx.scale, bent).to(saved.dtype), None, None, None


class _Mish(torch.autograd.Function):
    """x t forward, t = tanh(softplus(x)); g t + g x (1 - t) (1 + t) sigmoid(x) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = widen(x)
        return (wide * tanh(softplus(wide))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        x, grad = widen(saved), widen(grad_y)
        t = tanh(softplus(x))
        into = grad * x * ((1 - t) * (1 + t))
        z = torch.exp(x.clamp(max=_THRESHOLD))
        bent = torch.where(x > _THRESHOLD, into, into * z / (z + 1))
        return (grad * t + bent).to(saved.dtype)


class _Softshrink(torch.autograd.Function):
    """x -+ lambd outside of [-lambd, lambd], 0 inside; the gradient passes outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lambd: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.lambd = lambd
        wide = widen(x)
        is_inside = (wide >= -lambd) & (wide <= lambd)  # not so for NaN, which stays
        moved = torch.where(wide > lambd, wide - lambd, wide + lambd)
        return moved.masked_fill_(is_inside, 0.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        is_outside = (x > ctx.lambd) | (x < -ctx.lambd)
        zero = torch.zeros_like(grad_y)
        if torch.is_grad_enabled():  # differentiated again, the gradient must depend on x
            zero = torch.nan_to_num(x) * 0.0 + 0.0
        return torch.where(is_outside, grad_y, zero), None
