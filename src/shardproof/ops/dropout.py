"""Dropout keyed by position: which elements are dropped depends on seed, name, step and leaf.

So every rank draws the same mask of what all hold, and of what is cut each draws the masks of its
own leaves: the degree changes nothing, and the global generator, which ranks as threads share, is
not touched. A mask has one byte for each element and is kept for backward.

Source: Srivastava et al. 2014, in the inverted form in which evaluation needs no factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.random import draw_mask

Leaves = Sequence[tuple[int, slice]]


@dataclass(frozen=True)
class MaskKey:
    """What a mask depends on, besides its shape and the leaf.

    Attributes:
        seed: of the scheme.
        name: of the dropout, unique in the model.
        step: which mask of that dropout; a tensor, (), while operations are recorded.
    """

    seed: int
    name: str
    step: int | Tensor


def dropout(
    x: Tensor, p: float, key: MaskKey, *, dim: int = -1, leaves: Leaves | None = None
) -> Tensor:
    """Set each element to zero with probability `p`, and scale the others by 1 / (1 - p).

    What is dropped is multiplied by zero, as torch does it: a NaN stays one.

    Args:
        x: (*), Replicate; or (*, held, *), Shard(dim), if `leaves` are given.
        p: from 0 to 1.
        key: of the mask; the same on every rank.
        dim: that is cut, counted from either end.
        leaves: index of every leaf that this rank holds, and where it lies along `dim`.
    Returns:
        (*), the placement of `x`; `x` itself if `p` is 0.
    Raises:
        UsageError: `p` is no probability, or `x` is not of a floating dtype.
        ShapeError: the leaves are not the whole of `x` along `dim`.
    Comm:
        forward none; backward none.
    """
    if not 0 <= p <= 1:
        raise UsageError(f"{key.name}: p={p} is no probability. Use 0 to 1.")
    if not x.is_floating_point():
        raise UsageError(
            f"{key.name}: a dropout takes a floating-point tensor, got {x.dtype}. Use x.float()."
        )
    if p == 0:
        return x
    mask = _mask(x, p, key) if leaves is None else _mask_of_leaves(x, p, key, dim, leaves)
    return _Dropout.apply(x, mask, 0.0 if p == 1 else 1 / (1 - p))


def dropout_part(
    x: Tensor, p: float, key: MaskKey, *, shape: Sequence[int], dim: int, at: slice
) -> Tensor:
    """`dropout` of a part of a tensor, with its part of the mask of the whole tensor.

    Each rank draws the whole mask, one byte for each element, and keeps its part.

    Args:
        x: (*, own, *), Shard(dim).
        p: from 0 to 1.
        key: of the mask; the same on every rank.
        shape: of the whole.
        dim: the dim that is cut.
        at: the slice of `dim` that `x` holds.
    Returns:
        (*, own, *), Shard(dim).
    Comm:
        forward none; backward none.
    """
    mask = draw_mask(shape, p, seed=key.seed, name=key.name, step=key.step, device=x.device)
    part = mask.narrow(dim, at.start, at.stop - at.start).contiguous()
    return _Dropout.apply(x, part, 0.0 if p == 1 else 1 / (1 - p))


class _Dropout(torch.autograd.Function):
    """Mask and scale, forward and backward alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * scale).mul_(mask)  # rounded once: the mask is zeros and ones

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _Dropout.apply(grad_y, mask, ctx.scale), None, None


def _mask(x: Tensor, p: float, key: MaskKey) -> Tensor:
    return draw_mask(x.shape, p, seed=key.seed, name=key.name, step=key.step, device=x.device)


def _mask_of_leaves(x: Tensor, p: float, key: MaskKey, dim: int, leaves: Leaves) -> Tensor:
    """Every leaf's own mask, side by side along `dim`."""
    _check_leaves(x, dim, leaves, key.name)
    mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    shape = list(x.shape)
    for leaf, at in leaves:
        shape[dim] = at.stop - at.start
        leaf_mask = draw_mask(
            shape,
            p,
            seed=key.seed,
            name=key.name,
            step=key.step,
            leaf=leaf,
            device=x.device,
        )
        mask.narrow(dim, at.start, shape[dim]).copy_(leaf_mask)
    return mask


def _check_leaves(x: Tensor, dim: int, leaves: Leaves, name: str) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(
            f"{name}: dim {dim} wanted of a tensor of shape {tuple(x.shape)}, which has {x.dim()} "
            "dims."
        )
    stops = [0, *(at.stop for _, at in leaves)]
    if stops == [*(at.start for _, at in leaves), x.shape[dim]]:
        return
    raise ShapeError(
        f"{name}: dim {dim} of shape {tuple(x.shape)} has {x.shape[dim]} units, and the leaves "
        f"{list(leaves)} do not fill it one after the other. Give those that this rank holds."
    )
