"""Torch's activation functions, with its arguments, computed by `elementwise` and `piecewise`.

Plain tensors; no ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.errors import ShapeError, UsageError
from shardproof.numerics import elementwise, piecewise
from shardproof.numerics.broadcasting import broadcast
from shardproof.numerics.precision import widen

Form = Callable[..., Any]

_mul = broadcast(torch.mul)


def overwriting(form: Form) -> Form:
    """A form that writes its result into its input.

    Args:
        form: takes the tensor first; the result has its shape.
    Returns:
        A function of the same arguments, which returns the tensor itself.
    """

    def write(input: Tensor, *args: Any, **options: Any) -> Tensor:
        # A backward may have saved its input, which is about to be overwritten.
        wants = torch.is_grad_enabled() and input.requires_grad
        return input.copy_(form(input.clone() if wants else input, *args, **options))

    return write


def with_inplace(form: Form, position: int) -> Form:
    """A form of an activation that torch lets overwrite its input.

    Args:
        form: of the other arguments.
        position: of `inplace` among those that torch takes.
    Returns:
        A function with `inplace`.
    """
    write = overwriting(form)

    def either(*args: Any, inplace: bool = False, **options: Any) -> Any:
        if len(args) > position:
            args, inplace = (*args[:position], *args[position + 1 :]), args[position]
        return (write if inplace else form)(*args, **options)

    return either


def sigmoid(input: Tensor) -> Tensor:
    """`torch.sigmoid`."""
    return elementwise.sigmoid(input)


def tanh(input: Tensor) -> Tensor:
    """`torch.tanh`."""
    return elementwise.tanh(input)


def silu(input: Tensor) -> Tensor:
    """`F.silu`."""
    return elementwise.silu(input)


def mish(input: Tensor) -> Tensor:
    """`F.mish`."""
    return piecewise.mish(input)


def gelu(input: Tensor, *, approximate: Any = "none") -> Tensor:
    """`F.gelu`."""
    return elementwise.gelu(input, approximate)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """`F.softplus`."""
    return elementwise.softplus(input, beta, threshold)


def elu(input: Tensor, alpha: float = 1.0) -> Tensor:
    """`F.elu`."""
    return piecewise.elu(input, alpha)


def celu(input: Tensor, alpha: float = 1.0) -> Tensor:
    """`F.celu`."""
    return piecewise.celu(input, alpha)


def selu(input: Tensor) -> Tensor:
    """`F.selu`."""
    return piecewise.selu(input)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """`F.softshrink`."""
    return piecewise.softshrink(input, lambd)


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """`F.glu`: the first half of a dim, times the sigmoid of the second.

    Args:
        input: (*), whose shard has both halves of what it holds along `dim`.
        dim: which is halved.
    Returns:
        (*), with half of `dim`.
    Raises:
        ShapeError: the dim cannot be halved.
    """
    if input.shape[dim] % 2:
        raise ShapeError(f"glu: dim {dim} of {tuple(input.shape)} is odd. Give an even one.")
    half = input.shape[dim] // 2
    a, b = (widen(input.narrow(dim, at, half)) for at in (0, half))
    return (a * elementwise.sigmoid(b)).to(input.dtype)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`F.prelu`: `weight * x` below zero.

    Args:
        input: (N, C, *), any placement.
        weight: one element, Replicate, or (C,), as the channels are cut.
    Returns:
        (N, C, *), the placement of `input`.
    """
    slope = weight
    if weight.numel() != 1 and input.dim() > 1:
        slope = weight.reshape(-1, *[1] * (input.dim() - 2))
    elif weight.numel() == 1:
        slope = weight.reshape(())
    # Held at zero, because a backward multiplies what `where` drops by zero: inf gives NaN.
    return torch.where(input > 0, input, _mul(slope, input.clamp(max=0)))


def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False
) -> Tensor:
    """`F.rrelu` in evaluation: a leaky_relu of the mean slope.

    Args:
        input: (*), any placement.
        lower: of the slopes.
        upper: of the slopes.
        training: False, or the slopes are one.
    Returns:
        (*), the placement of `input`.
    Raises:
        UsageError: in training, unless there is one slope.
    """
    if training and lower != upper:
        raise UsageError(
            "rrelu: training=True draws a slope for every element from the global generator, whose "
            "numbers change with the cut. Use leaky_relu."
        )
    return F.leaky_relu(input, (lower + upper) / 2)
