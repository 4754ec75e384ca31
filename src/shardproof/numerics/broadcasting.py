"""Torch's functions of several operands, where some are repeated: gradients in a fixed order.

`x * w` with one `w` for many rows holds forward. Backward, torch sums the gradient of `w` over the
rows by `Tensor.sum`, whose order moves with the other dims and with threads. Here an operand that
is repeated and wants a gradient is first expanded by `dim_sums.expand`, which sums by a fold.
Plain tensors; no ranks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import UsageError
from shardproof.numerics.dim_sums import expand
from shardproof.numerics.precision import widen

Form = Callable[..., Any]

_NARROW = (torch.bfloat16, torch.float16)


def broadcast(function: Form) -> Form:
    """A function of torch, with its operands expanded first where that changes a gradient.

    Args:
        function: pointwise in all of its tensors, whatever else it takes.
    Returns:
        A function of the same arguments.
    """

    @functools.wraps(function, updated=())
    def form(*args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if not _are_repeated(tensors):
            return function(*args, **kwargs)
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        dtype = _result_dtype(tensors)
        y = function(
            *(expanded(x, shape) for x in args),
            **{name: expanded(x, shape) for name, x in kwargs.items()},
        )
        # Expanded, a number of fp32 would widen a tensor of bf16.
        is_wide = y.is_floating_point() and y.dtype is not dtype and y is not args[0]
        return y.to(dtype) if is_wide else y

    return form


def in_fp32(function: Form) -> Form:
    """A function of torch, with bf16 and fp16 computed in fp32 and rounded once.

    Some of torch's kernels round a narrow number twice in their scalar tail and once in their
    vector body.

    Args:
        function: pointwise in all of its tensors.
    Returns:
        A function of the same arguments.
    """

    @functools.wraps(function, updated=())
    def form(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not any(x.dtype in _NARROW for x in tensors):
            return function(*args, **kwargs)
        dtype = _result_dtype(tensors)
        wide = [widen(x) if isinstance(x, Tensor) else x for x in args]
        wide_kwargs = {name: widen(x) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
        y = function(*wide, **wide_kwargs)
        return y.to(dtype) if y.is_floating_point() else y

    return form


def expanded(x: Any, shape: Sequence[int]) -> Any:
    """A tensor by `dim_sums.expand`, anything else as it is.

    Args:
        x: (*), any placement; or no tensor.
        shape: of the result.
    """
    return expand(x, shape) if isinstance(x, Tensor) else x


def expand_to(input: Tensor, *size: Any, **options: Any) -> Tensor:
    """`Tensor.expand`."""
    shape = options.pop("size", None) or flat_sizes(size)
    return expand(input, shape)


def expand_as(input: Tensor, other: Tensor) -> Tensor:
    """`Tensor.expand_as`."""
    return expand(input, other.shape)


def broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    """`torch.broadcast_tensors`."""
    sequence = tensors[0] if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else tensors
    shape = torch.broadcast_shapes(*(x.shape for x in sequence))
    return tuple(expand(x, shape) for x in sequence)


def repeat(input: Tensor, *repeats: Any) -> Tensor:
    """`Tensor.repeat` and `torch.tile`."""
    counts = flat_sizes(repeats)
    lead = len(counts) - input.dim()
    if lead < 0:
        raise UsageError(
            f"repeat: {len(counts)} counts for {input.dim()} dims. Give one for each dim or more."
        )
    sizes = [1] * lead + list(input.shape)
    pairs = [pair for count, size in zip(counts, sizes, strict=True) for pair in (count, size)]
    apart = input.reshape([n for size in sizes for n in (1, size)])
    return expand(apart, pairs).reshape([n * size for n, size in zip(counts, sizes, strict=True)])


def tile(input: Tensor, *dims: Any, **options: Any) -> Tensor:
    """`torch.tile`."""
    counts = flat_sizes((options.pop("dims"),) if "dims" in options else dims)
    return repeat(input, *[1] * (input.dim() - len(counts)), *counts)


def repeat_interleave(
    input: Tensor, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    """`torch.repeat_interleave`."""
    if repeats is None:
        return torch.repeat_interleave(input, output_size=output_size)
    if dim is None:
        input, dim = input.reshape(-1), 0
    if isinstance(repeats, Tensor):
        if repeats.numel() != 1:  # the backward of index_select adds one by one
            index = torch.repeat_interleave(repeats, output_size=output_size)
            return input.index_select(dim, index)
        repeats = int(repeats)
    at = dim % input.dim() + 1
    shape = list(input.shape)
    apart = expand(input.unsqueeze(at), [*shape[:at], repeats, *shape[at:]])
    return apart.reshape([*shape[: at - 1], shape[at - 1] * repeats, *shape[at:]])


def flat_sizes(sizes: Sequence[Any]) -> list[int]:
    """Sizes that were given one by one, or as one sequence.

    Args:
        sizes: what stands behind the tensor.
    """
    if len(sizes) == 1 and not isinstance(sizes[0], int):
        return list(sizes[0])
    return list(sizes)


def _are_repeated(tensors: Sequence[Tensor]) -> bool:
    """Whether one that wants a gradient is smaller than the result."""
    if not torch.is_grad_enabled() or len(tensors) < 2:
        return False
    shape = tensors[0].shape
    if all(x.shape == shape for x in tensors[1:]):
        return False
    count = math.prod(torch.broadcast_shapes(*(x.shape for x in tensors)))
    return any(x.requires_grad and x.numel() != count for x in tensors)


def _result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The result dtype of floating-point operands.

    A tensor without dims does not widen one with dims.
    """
    floats = [x for x in tensors if x.is_floating_point()] or list(tensors)
    with_dims = [x for x in floats if x.dim()] or floats
    return functools.reduce(torch.promote_types, (x.dtype for x in with_dims))


_mul, _add, _sub = broadcast(torch.mul), broadcast(torch.add), broadcast(torch.sub)


def complex_product(a: Any, b: Any) -> Tensor:
    """The product of two operands of which one at least is complex.

    Torch's own rounds an element in another way where a vector ends, and by its strides.

    Args:
        a: (*), a tensor or a number.
        b: (*), likewise, of a shape that broadcasts with that of `a`.
    Returns:
        (*), complex.
    """
    (a_real, a_imag), (b_real, b_imag) = _real_and_imaginary(a), _real_and_imaginary(b)
    if a_imag is None:
        return torch.complex(_mul(a_real, b_real), _mul(a_real, b_imag))
    if b_imag is None:
        return torch.complex(_mul(a_real, b_real), _mul(a_imag, b_real))
    real = _sub(_mul(a_real, b_real), _mul(a_imag, b_imag))
    return torch.complex(real, _add(_mul(a_real, b_imag), _mul(a_imag, b_real)))


def _real_and_imaginary(x: Any) -> tuple[Any, Any]:
    """Both parts of an operand; None for the second of a real one."""
    if isinstance(x, complex):
        return x.real, x.imag
    if not isinstance(x, Tensor) or not x.is_complex():
        return x, None
    real, imag = torch.view_as_real(x.resolve_conj()).unbind(-1)
    return real, imag
