"""Rules for convolutions: local if each rank holds whole groups, else windows and a product."""

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from shardproof.cut.alignment import fitted
from shardproof.cut.fallback import gathered, invariant
from shardproof.cut.matrix_products import product
from shardproof.cut.tensor import CutTensor, cut_tensor, rule
from shardproof.units import CutDim

_NAMES = ("conv1d", "conv2d", "conv3d")


@rule(*_NAMES)
def conv(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A convolution of a cut input or with a cut weight."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    options: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    options |= dict(zip(names, args, strict=False)) | kwargs
    x, weight, n = options["input"], options["weight"], int(name[4])
    if x.dim() != n + 2:
        return gathered(func, name, args, kwargs)
    if options["groups"] == 1:
        return _by_windows(x, weight, options["bias"], options, n)
    along = _by_groups(x, weight, options["groups"])
    if along is None:
        return gathered(func, name, args, kwargs)
    return _grouped(func, x, weight, options, along)


def _by_groups(x: Any, weight: Any, groups: int) -> CutDim | None:
    """How the output channels are cut if every rank holds whole groups, else None.

    Args:
        x: (B, C, *size).
        weight: (C_out, C / groups, *kernel).
        groups: number of groups of channels.
    """
    are_cut = isinstance(x, CutTensor) and isinstance(weight, CutTensor)
    if not are_cut or x.spec.dim != 1 or weight.spec.dim != 0 or x.shape[1] % groups:
        return None
    region, cut = x.spec.region, x.spec.cut
    key = ("grouped", id(cut), groups, weight.shape[0])
    if key not in region.recipes:
        labels = cut.labels.reshape(groups, -1)
        is_whole = bool((labels == labels[:, :1]).all())
        outs = np.repeat(labels[:, 0], weight.shape[0] // groups)
        region.recipes[key] = region.one(CutDim.of_labels(cut.shared, outs)) if is_whole else None
    output_cut: CutDim | None = region.recipes[key]
    return output_cut


def _grouped(
    func: Any, x: CutTensor, weight: CutTensor, settings: dict[str, Any], along: CutDim
) -> CutTensor:
    """Convolve the groups of channels that this rank holds."""
    region, who = x.spec.region, weight.who
    own = fitted(weight, region.spec(tuple(weight.shape), 0, along), who)
    bias = settings["bias"]
    if bias is not None:
        bias = fitted(bias, region.spec(tuple(bias.shape), 0, along), who)
    num_channels = x.local.shape[1] * settings["groups"] // x.shape[1]
    options = {key: settings[key] for key in ("stride", "padding", "dilation")}
    if num_channels:
        y = invariant(region, func, who)(x.local, own, bias, **options, groups=num_channels)
    else:
        sizes = _out_sizes(x.shape[2:], weight.shape[2:], settings)
        used = (
            x.local.sum() + own.sum()
        )  # a tensor that gets a gradient on other ranks must get one here too
        used = used if bias is None else used + bias.sum()
        y = used.expand(x.shape[0], 0, *sizes)
    return cut_tensor(y, region.spec((y.shape[0], along.size, *y.shape[2:]), 1, along), who)


def _each(value: Any, n: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * n


def _padding(options: dict[str, Any], kernel: tuple[int, ...]) -> list[tuple[int, int]]:
    """Padding before and after, for each spatial dim."""
    n = len(kernel)
    if options["padding"] == "valid":
        return [(0, 0)] * n
    if options["padding"] == "same":
        spans = [d * (k - 1) for d, k in zip(_each(options["dilation"], n), kernel, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(p, p) for p in _each(options["padding"], n)]


def _out_sizes(
    sizes: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any]
) -> tuple[int, ...]:
    n = len(kernel)
    stride, dilation = _each(options["stride"], n), _each(options["dilation"], n)
    return tuple(
        (size + sum(pad) - d * (k - 1) - 1) // s + 1
        for size, pad, d, k, s in zip(
            sizes, _padding(options, kernel), dilation, kernel, stride, strict=True
        )
    )


def _by_windows(x: Any, weight: Any, bias: Any, options: dict[str, Any], n: int) -> Any:
    """(B, C, *size) as windows (B, *out, C * kernel), times the weight as a matrix."""
    kernel = tuple(weight.shape[2:])
    pads = [each for pad in reversed(_padding(options, kernel)) for each in pad]
    if any(pads):
        x = F.pad(x, pads)
    stride, dilation = _each(options["stride"], n), _each(options["dilation"], n)
    for place in range(n):
        span = dilation[place] * (kernel[place] - 1) + 1
        x = _unfolded(x, 2 + place, span, stride[place], dilation[place])
    order = [0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)]
    x = x.permute(order).reshape(x.shape[0], *x.shape[2 : 2 + n], x.shape[1] * math.prod(kernel))
    y = product(x, weight.reshape(weight.shape[0], -1), bias, is_transposed=False, func=_FUNCS[n])
    return y.permute(0, n + 1, *range(1, n + 1))


def _unfolded(x: Any, dim: int, span: int, step: int, dilation: int) -> Any:
    """Unfold one dim into windows, which become a new last dim."""
    y = x.unfold(dim, span, step)
    return y if dilation == 1 else y[..., ::dilation]


_FUNCS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
