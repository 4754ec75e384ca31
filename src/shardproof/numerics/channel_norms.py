"""Norms over channels: of groups, of single channels, and of a batch.

The elements that are normalised together are one row of `softmax_and_norms`. Weight and bias have
one element for each channel. Their gradients are summed over batch and positions by halving folds.
Plain tensors; no ranks.
"""

import math

import torch
from torch import Tensor

from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.broadcasting import broadcast
from shardproof.numerics.dim_sums import total
from shardproof.numerics.elementwise import check_floating
from shardproof.numerics.precision import widen
from shardproof.numerics.softmax_and_norms import affine, centred

_mul = broadcast(torch.mul)
_add = broadcast(torch.add)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`layer_norm` over the channels of a group, and all places.

    Args:
        input: (N, C, *), Shard(0), or Shard(1) by whole groups.
        num_groups: that `input` has: those of the shard.
        weight: (C,), as the channels are cut, or None.
        bias: (C,), as the channels are cut, or None.
        eps: added to the variance.
    Returns:
        (N, C, *), the placement of `input`.
    Raises:
        ShapeError: the groups do not divide the channels.
    """
    x = widen(check_floating(input, "group_norm"))
    batch, channels = input.shape[:2]
    if channels and (num_groups < 1 or channels % num_groups):
        raise ShapeError(
            f"group_norm: {channels} channels in {num_groups} groups: {num_groups} does not divide "
            f"{channels}. Give groups of whole channels."
        )
    if not x.numel():
        return input * 1.0
    rows = x.reshape(batch * num_groups, -1)
    normed = centred(rows, eps).reshape(input.shape)
    return affine(normed, _by_channel(weight, x), _by_channel(bias, x)).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`group_norm` of one channel a group; or `batch_norm` by running statistics.

    Args:
        input: (N, C, *), Shard(0) or Shard(1).
        running_mean: (C,), used in place of the input's where `use_input_stats` is False.
        running_var: (C,), likewise.
        weight: (C,), as the channels are cut, or None.
        bias: (C,), as the channels are cut, or None.
        use_input_stats: which statistics.
        momentum: not needed: running statistics are not updated here.
        eps: added to the variance.
    Returns:
        (N, C, *), the placement of `input`.
    Raises:
        UsageError: running statistics would have to be updated.
    """
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is not None:
        raise UsageError(
            "instance_norm: running statistics together with those of the input have no invariant "
            "form. Use track_running_stats=False."
        )
    return group_norm(input, input.shape[1], weight, bias, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Each channel by its own mean and variance: of the batch in training, else the running ones.

    Args:
        input: (N, C, *), Shard(1); in evaluation also Shard(0).
        running_mean: (C,), as the channels are cut; updated in training.
        running_var: (C,), likewise.
        weight: (C,), as the channels are cut, or None.
        bias: (C,), as the channels are cut, or None.
        training: which statistics.
        momentum: of the update.
        eps: added to the variance.
    Returns:
        (N, C, *), the placement of `input`.
    Raises:
        ShapeError: there is one value for each channel in training.
        UsageError: there are no statistics.
    """
    x = widen(check_floating(input, "batch_norm"))
    if training:
        normed = _normed_batch(x, running_mean, running_var, momentum, eps)
    else:
        if running_mean is None or running_var is None:
            raise UsageError("batch_norm in evaluation takes running_mean and running_var.")
        inverse = torch.rsqrt(widen(running_var) + eps)
        mean = widen(running_mean)
        normed = _mul(_add(x, _by_channel(-mean, x)), _by_channel(inverse, x))
    return affine(normed, _by_channel(weight, x), _by_channel(bias, x)).to(input.dtype)


def _normed_batch(
    x: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float | None, eps: float
) -> Tensor:
    turned = x.transpose(0, 1)
    count = math.prod(turned.shape[1:])
    if count == 1:
        raise ShapeError(f"batch_norm: one value for each channel in training: {tuple(x.shape)}.")
    rows = turned.reshape(x.shape[1], count)
    if mean is not None and var is not None and momentum is not None:
        with torch.no_grad():
            now = total(rows, 1) / count
            far = rows - now[:, None]
            spread = total(far * far, 1) / (count - 1)
            mean.copy_(mean * (1 - momentum) + now * momentum)
            var.copy_(var * (1 - momentum) + spread * momentum)
    return centred(rows, eps).reshape(turned.shape).transpose(0, 1)


def _by_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """(C,) to (C, 1, ...), which broadcasts with (N, C, *)."""
    return None if parameter is None else parameter.reshape(-1, *[1] * (x.dim() - 2))
