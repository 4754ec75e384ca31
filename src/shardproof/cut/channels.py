"""Norms of channels and of weights, and windows of images: each rank does what it holds."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.cut.others import computed, gathered, invariant
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor, rule
from shardproof.ops import unit_ops
from shardproof.units import CutDim


def _affine(region: Region, y: Any, weight: Any, bias: Any) -> Any:
    """A factor and a shift for every channel, each cut or whole."""
    shape = (-1, *[1] * (y.dim() - 2))
    for func, each in ((torch.mul, weight), (torch.add, bias)):
        if each is not None:
            y = computed(region, func, y, each.reshape(shape))
    return y


@rule("group_norm")
def group_norm(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A `layer_norm` of every group, whether ranks hold whole groups or a part of each."""
    names = ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")
    given = {"weight": None, "bias": None, "eps": 1e-5} | dict(zip(names, args, strict=False))
    given |= kwargs
    x, groups = given["input"], given["num_groups"]
    region = _region(given)
    if not isinstance(x, CutTensor):
        y = invariant(region, F.group_norm, "")(x, groups, None, None, given["eps"])
        return _affine(region, y, given["weight"], given["bias"])
    rows = x.reshape(x.shape[0], groups, -1)
    rows = computed(region, F.layer_norm, rows, rows.shape[2:], None, None, given["eps"])
    return _affine(region, rows.reshape(x.shape), given["weight"], given["bias"])


def _region(given: dict[str, Any]) -> Any:
    return next(each.spec.region for each in given.values() if isinstance(each, CutTensor))


@rule("batch_norm", "instance_norm")
def batch_norm(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each channel by its own numbers; running statistics are whole, and written on every rank."""
    if func in (torch.batch_norm, torch.instance_norm):
        names = ("input", "weight", "bias", "running_mean", "running_var")
    else:
        names = ("input", "running_mean", "running_var", "weight", "bias")
    usual = {"training": name == "instance_norm", "momentum": 0.1, "eps": 1e-5}
    given: dict[str, Any] = dict.fromkeys(names) | usual
    given |= dict(zip((*names, "training", "momentum", "eps"), args, strict=False)) | kwargs
    x, training = given["input"], given.get("use_input_stats", given["training"])
    compute = F.batch_norm if name == "batch_norm" else F.instance_norm
    region = _region(given)
    form = invariant(region, compute, "")
    means = [given["running_mean"], given["running_var"]]
    if not isinstance(x, CutTensor):
        y = form(x, *means, None, None, training, given["momentum"], given["eps"])
        return _affine(region, y, given["weight"], given["bias"])
    if x.spec.dim != 1 or any(isinstance(each, CutTensor) for each in means):
        return gathered(func, name, args, kwargs)
    place = region.place(x.spec.cut, x.who)
    own = [None if each is None else unit_ops.held_part(each, 0, place) for each in means]
    own = [None if each is None else each.clone() for each in own]
    y = form(x.local, *own, None, None, training, given["momentum"], given["eps"])
    if training:
        with torch.no_grad():
            for each, part in zip(means, own, strict=True):
                if each is not None and part is not None:
                    each.copy_(unit_ops.gather(part, 0, place))
    return _affine(region, cut_tensor(y, x.spec, x.who), given["weight"], given["bias"])


@rule("im2col")
def im2col(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(N, C, *) to (N, C * window, places): the window of a channel is where the channel is."""
    return _windows(F.unfold, args, kwargs, grows=True)


@rule("col2im")
def col2im(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The sum of windows, likewise."""
    return _windows(F.fold, args, kwargs, grows=False)


def _windows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, grows: bool) -> Any:
    x = args[0] if args else kwargs["input"]
    size = kwargs.get("kernel_size") or args[1 if grows else 2]
    window = size * size if isinstance(size, int) else int(np.prod(size))
    channel = x.dim() - 2 if not grows else x.dim() - 3
    labels: Any = x.spec.cut.labels if isinstance(x, CutTensor) else np.zeros(0)
    made = np.repeat(labels, window) if grows else labels[::window]
    is_whole = grows or np.array_equal(np.repeat(made, window), labels)
    if not isinstance(x, CutTensor) or x.spec.dim != channel or not is_whole or not x.local.numel():
        return gathered(func, func.__name__, args, kwargs)
    y: Tensor = invariant(x.spec.region, func, x.who)(x.local, *args[1:], **kwargs)
    cut = CutDim.of_labels(x.spec.cut.shared, made)
    shape = (*y.shape[:channel], cut.size, *y.shape[channel + 1 :])
    return cut_tensor(y, x.spec.region.spec(shape, channel, cut), x.who)


@rule("_weight_norm")
def weight_norm(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`g * v / norm(v)`, with the norm over all dims but `dim`, as torch parametrizes weights."""
    given = {"dim": 0} | dict(zip(("v", "g", "dim"), args, strict=False)) | kwargs
    v, g, dim = given["v"], given["g"], given["dim"]
    others = [each for each in range(v.dim()) if each != dim]  # dim=-1: one norm
    norm = torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()
    return v * (g / norm)
