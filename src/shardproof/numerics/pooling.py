"""Average pooling, one spatial dim after the other.

The bits of a window depend on its own elements alone, not on the number of channels or samples:
`dim_sums.total` adds the elements along each dim. Max pooling needs no form: torch's own keeps the
bits. Plain tensors; no ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.dim_sums import mean, total
from shardproof.numerics.elementwise import check_floating
from shardproof.numerics.precision import widen


def average(dims: int) -> Callable[..., Tensor]:
    """Make the form of `avg_pool1d`, `avg_pool2d` or `avg_pool3d`.

    Args:
        dims: number of spatial dims, 1 to 3.
    Returns:
        A function of torch's arguments; its input is (N, C, *) or (C, *), Replicate along `*`.
    """

    def form(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        _check(input, dims, f"avg_pool{dims}d")
        taps = _sizes(kernel_size, dims)
        has_stride = stride is not None and stride not in ((), [])
        steps = _sizes(stride, dims) if has_stride else taps
        pads = _sizes(padding, dims)
        if divisor_override == 0 or any(2 * pad > tap for pad, tap in zip(pads, taps, strict=True)):
            raise UsageError(
                f"avg_pool{dims}d: padding={padding} of windows of {kernel_size}, and "
                f"divisor_override={divisor_override}. Give at most half of a window as padding, "
                "and a divisor that is not 0."
            )
        y = widen(input)
        counts = y.new_ones(())
        for n, (tap, step, pad) in enumerate(zip(taps, steps, pads, strict=True)):
            dim = input.dim() - dims + n
            starts = _starts(input.shape[dim], tap, step, pad, is_ceiled=ceil_mode)
            if not starts:
                raise ShapeError(
                    f"avg_pool{dims}d of {tuple(input.shape)} by windows of {tap} along dim {dim} "
                    "has no window that fits. Give a larger input, or padding."
                )
            most = input.shape[dim] + (pad if count_include_pad else 0)
            least = -pad if count_include_pad else 0
            each = [min(at + tap, most) - max(at, least) for at in starts]
            counts = counts[..., None] * counts.new_tensor(each)
            behind = max(0, starts[-1] + tap - input.shape[dim])
            padded = F.pad(y, [0, 0] * (y.dim() - 1 - dim) + [pad, behind])
            y = total(padded.unfold(dim, tap, step).narrow(dim, 0, len(starts)), -1)
        return (y / (counts if divisor_override is None else divisor_override)).to(input.dtype)

    form.__name__ = f"avg_pool{dims}d"
    return form


def adaptive_average(dims: int) -> Callable[..., Tensor]:
    """Make the form of `adaptive_avg_pool1d`, `adaptive_avg_pool2d` or `adaptive_avg_pool3d`.

    Args:
        dims: number of spatial dims, 1 to 3.
    Returns:
        A function of torch's arguments; its input is (N, C, *) or (C, *), Replicate along `*`.
    """

    def form(input: Tensor, output_size: Any) -> Tensor:
        _check(input, dims, f"adaptive_avg_pool{dims}d")
        y = widen(input)
        for n, output_length in enumerate(_sizes(output_size, dims)):
            dim = input.dim() - dims + n
            y = _averaged(y, dim, input.shape[dim] if output_length is None else output_length)
        return y.to(input.dtype)

    form.__name__ = f"adaptive_avg_pool{dims}d"
    return form


def _averaged(x: Tensor, dim: int, output_length: int) -> Tensor:
    """Adaptive average pooling along one dim."""
    size = x.shape[dim]
    if output_length and size % output_length == 0:
        return mean(x.unflatten(dim, (output_length, size // output_length)), dim + 1)
    runs = [
        (n * size // output_length, math.ceil((n + 1) * size / output_length))
        for n in range(output_length)
    ]
    parts = [mean(x.narrow(dim, start, stop - start), dim) for start, stop in runs]
    return torch.stack(parts, dim) if parts else x.narrow(dim, 0, 0)


def _starts(size: int, tap: int, step: int, pad: int, *, is_ceiled: bool) -> list[int]:
    """Where windows begin, counted from the first element: none begins behind the last one."""
    room = size + 2 * pad - tap
    count = (math.ceil(room / step) if is_ceiled else room // step) + 1
    starts = [n * step - pad for n in range(count)]
    return [at for at in starts if at < size] if is_ceiled else starts


def _sizes(value: Any, dims: int) -> list[Any]:
    sizes = [*value] if isinstance(value, Sequence) else [value]
    if len(sizes) not in (1, dims):
        raise UsageError(f"{value} has {len(sizes)} sizes for {dims} spatial dims. Give {dims}.")
    return sizes * dims if len(sizes) == 1 else sizes


def _check(input: Tensor, dims: int, name: str) -> None:
    check_floating(input, name)
    if input.dim() not in (dims + 1, dims + 2):
        raise UsageError(
            f"{name} takes (N, C, *) or (C, *) with {dims} spatial dims, and the input has shape "
            f"{tuple(input.shape)}. Reshape the input."
        )
