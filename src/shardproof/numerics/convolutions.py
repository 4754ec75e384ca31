"""Convolutions by our own products, one sample at a time: no sum asks for channels or batch.

The windows of a sample are copied side by side, (channels * taps, places), and multiplied by the
weight of each group: an output is one contraction over channels and taps. Backward, windows go back
tap by tap, and the weight's gradient is one product for each sample, added from first to last. A
convolution of single channels (depthwise) has nothing to contract but taps, which are added up tap
by tap for all channels at once. A shard without channels gives an empty result, where torch raises.

The gradients cannot be differentiated again. Plain tensors; no ranks.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.autograd import once_differentiable
from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.dim_sums import total
from shardproof.numerics.elementwise import check_floating
from shardproof.numerics.precision import widen
from shardproof.numerics.torch_products import add, batched_product


@dataclass(frozen=True)
class _Windows:
    """Where the windows of a convolution lie; sizes of the dims of space alone.

    Attributes:
        taps: the sizes of a window.
        stride: from window to window.
        dilation: from tap to tap.
        padded: the sizes of the padded input.
        groups: of channels.
    """

    taps: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padded: tuple[int, ...]
    groups: int

    @property
    def places(self) -> tuple[int, ...]:
        """How many windows there are, along each dim."""
        dims = zip(self.padded, self.taps, self.stride, self.dilation, strict=True)
        return tuple((size - (tap - 1) * gap - 1) // step + 1 for size, tap, step, gap in dims)

    def offsets(self) -> Iterator[tuple[slice, ...]]:
        """For each tap, where it meets the padded input."""
        dims = list(zip(self.places, self.stride, self.dilation, strict=True))
        for tap in itertools.product(*(range(size) for size in self.taps)):
            yield tuple(
                slice(at * gap, at * gap + (count - 1) * step + 1, step)
                for at, (count, step, gap) in zip(tap, dims, strict=True)
            )

    def columns(self, x: Tensor) -> Tensor:
        """One padded sample (C, *padded) to (groups, C / groups * taps, places)."""
        rows = x.shape[0] // self.groups * math.prod(self.taps)
        return self._windows(x).reshape(self.groups, rows, math.prod(self.places))

    def scattered(self, columns: Tensor, channels: int) -> Tensor:
        """(groups, C / groups * taps, places) to one padded sample, added tap by tap."""
        x = columns.new_zeros(channels, *self.padded)
        if all(step >= tap * gap for tap, step, gap in self._dims()):  # none meets another
            self._windows(x).copy_(columns.reshape(channels, *self.taps, *self.places))
            return x
        parts = columns.reshape(channels, math.prod(self.taps), *self.places)
        for number, where in enumerate(self.offsets()):
            _at(x, where).add_(parts[:, number])
        return x

    def _windows(self, x: Tensor) -> Tensor:
        """(C, *padded) to (C, *taps, *places), a view."""
        channel, *strides = x.stride()
        between = [n * gap for n, gap in zip(strides, self.dilation, strict=True)]
        onward = [n * step for n, step in zip(strides, self.stride, strict=True)]
        shape = (x.shape[0], *self.taps, *self.places)
        return x.as_strided(shape, (channel, *between, *onward), x.storage_offset())

    def _dims(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.taps, self.stride, self.dilation, strict=True)


def convolution(dims: int) -> Callable[..., Tensor]:
    """`conv1d`, `conv2d` or `conv3d`.

    Args:
        dims: of space.
    """

    def form(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if input.dim() == dims + 1:
            alone = form(input[None], weight, bias, stride, padding, dilation, groups)
            return alone[0]
        _check(input, weight, groups, dims)
        steps, gaps = (_sizes(each, dims) for each in (stride, dilation))
        x = F.pad(input, _padding(padding, dims, weight.shape[2:], steps, gaps))
        taps = tuple(weight.shape[2:])
        windows = _Windows(taps, steps, gaps, tuple(x.shape[2:]), groups)
        if min(windows.places) < 1:
            raise ShapeError(
                f"a convolution of {tuple(input.shape)} by {tuple(weight.shape)} has no window "
                "that fits. Give a larger input, or padding."
            )
        function = _Depthwise if weight.shape[1] == 1 else _Convolution
        y = function.apply(widen(x), widen(weight), windows)
        if bias is not None:
            y = add(y, widen(bias).reshape(-1, *[1] * dims))
        return y.to(input.dtype)

    form.__name__ = f"conv{dims}d"
    return form


class _Convolution(torch.autograd.Function):
    """One product for each sample and group, forward; two backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, windows: _Windows) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.windows = windows
        matrix = _by_group(weight, windows)
        y = x.new_empty(x.shape[0], weight.shape[0], *windows.places)
        if y.numel():
            for sample, out in zip(x, y, strict=True):
                out.copy_(batched_product(matrix, windows.columns(sample)).view_as(out))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        windows: _Windows = ctx.windows
        needs_x, needs_weight, _ = ctx.needs_input_grad
        matrix = _by_group(weight, windows).mT
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None
        grad_weight = matrix.mT.new_zeros(matrix.mT.shape) if needs_weight else None
        for at in range(x.shape[0] if grad_y.numel() else 0):
            grad = grad_y[at].reshape(windows.groups, -1, math.prod(windows.places))
            if grad_x is not None:
                grad_x[at] = windows.scattered(batched_product(matrix, grad), x.shape[1])
            if grad_weight is not None:
                grad_weight += batched_product(grad, windows.columns(x[at]).mT)
        return grad_x, None if grad_weight is None else grad_weight.view_as(weight), None


class _Depthwise(torch.autograd.Function):
    """Tap by tap, all channels at once; each channel of the input serves one output or more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, windows: _Windows) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.windows = windows
        wide = _served(x, weight)
        y = x.new_zeros(x.shape[0], weight.shape[0], *windows.places)
        for tap, where in zip(_taps(weight), windows.offsets(), strict=True):
            y.addcmul_(tap, _at(wide, where))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        windows: _Windows = ctx.windows
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            grad_wide = x.new_zeros(x.shape[0], weight.shape[0], *windows.padded)
            for tap, where in zip(_taps(weight), windows.offsets(), strict=True):
                _at(grad_wide, where).addcmul_(tap, grad_y)
            grad_x = grad_wide
            if weight.shape[0] != x.shape[1]:
                served = weight.shape[0] // x.shape[1]
                apart = grad_wide.reshape(*x.shape[:2], served, *windows.padded)
                grad_x = total(apart, 2)
        if needs_weight:
            wide = _served(x, weight)
            dims = [0, *range(2, x.dim())]
            parts = [total(grad_y * _at(wide, where), dims) for where in windows.offsets()]
            grad_weight = torch.stack(parts, 1).view_as(weight)
        return grad_x, grad_weight, None


def _at(x: Tensor, where: tuple[slice, ...]) -> Tensor:
    """A view of the last dims."""
    places: tuple[Any, ...] = (..., *where)
    return x[places]


def _served(x: Tensor, weight: Tensor) -> Tensor:
    """The input channel of each output."""
    if x.shape[1] == weight.shape[0]:
        return x
    return x.repeat_interleave(weight.shape[0] // x.shape[1], 1)


def _taps(weight: Tensor) -> Iterator[Tensor]:
    """For each tap, (channels, 1, ...), which broadcasts with a sample."""
    flat = weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))
    for tap in flat.unbind(1):
        yield tap.reshape(-1, *[1] * (weight.dim() - 2))


def _by_group(weight: Tensor, windows: _Windows) -> Tensor:
    rows = weight.shape[0] // windows.groups
    return weight.reshape(windows.groups, rows, math.prod(weight.shape[1:]))


def _sizes(size: Any, dims: int) -> tuple[int, ...]:
    if isinstance(size, int):
        return (size,) * dims
    return tuple(size) * dims if len(size) == 1 else tuple(size)


def _padding(
    padding: Any, dims: int, taps: Sequence[int], stride: Sequence[int], gaps: Sequence[int]
) -> list[int]:
    """As `F.pad` takes it: the last dim first."""
    if padding == "valid":
        return [0, 0] * dims
    if padding == "same":
        if any(step != 1 for step in stride):
            raise UsageError("a convolution with padding='same' takes stride=1. Give numbers.")
        spare = [(tap - 1) * gap for tap, gap in zip(taps, gaps, strict=True)]
        return [side for n in reversed(spare) for side in (n // 2, n - n // 2)]
    return [n for size in reversed(_sizes(padding, dims)) for n in (size, size)]


def _check(x: Tensor, weight: Tensor, groups: int, dims: int) -> None:
    check_floating(x, f"conv{dims}d")
    fits = x.dim() == weight.dim() == dims + 2 and x.shape[1] == weight.shape[1] * groups
    if not fits or (groups and weight.shape[0] % groups):
        raise ShapeError(
            f"conv{dims}d: an input {tuple(x.shape)} and a weight {tuple(weight.shape)} in "
            f"{groups} groups do not fit each other."
        )
