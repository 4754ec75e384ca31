"""Collectives on plain tensors along a dim of which a rank has several runs of indices.

A rank sends its runs side by side; the caller brings them into the order of the whole dim, and of
shared units sends the owner's copy alone. Nothing is computed. No autograd.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shardproof.axis import Axis
from shardproof.comm.gathers import gather_parts
from shardproof.comm.plans import sizes_plan
from shardproof.errors import ShapeError
from shardproof.index_runs import join, take
from shardproof.observing import shard
from shardproof.recut import swap
from shardproof.transport.base import Call
from shardproof.units import Indices, slices_of


def all_gather_sizes(
    x: Tensor, axis: Axis, *, dim: int, sizes: tuple[int, ...], direction: str, who: str = ""
) -> Tensor:
    """Join the ranks' parts along `dim`, in rank order.

    Args:
        x: (*, sizes[axis.rank], *), Shard(dim).
        axis: the axis over which the ranks gather.
        dim: along which the parts are joined, counted from the front.
        sizes: every rank's length along `dim`, the same on all ranks.
        direction: for the ledger.
        who: the layer that asks, for messages.

    Returns:
        (*, sum of sizes, *), Replicate, a new tensor.

    Raises:
        ShapeError: `x` does not have this rank's length.

    Comm:
        `direction` one all_gather of (*, sum of sizes, *).
    """
    if x.shape[dim] != sizes[axis.rank]:
        raise ShapeError(
            f"{who or 'all_gather'} on {axis}: dim {dim} of shape {tuple(x.shape)} has "
            f"{x.shape[dim]} indices, and this rank gives {sizes[axis.rank]}. Give the part that "
            "the sizes describe."
        )
    if axis.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    before, after = tuple(x.shape[:dim]), tuple(x.shape[dim + 1 :])
    plan = sizes_plan(direction, who, before, after, x.dtype, sizes)
    return gather_parts(x, axis, plan, shard(dim))


def move(
    x: Tensor,
    axis: Axis,
    *,
    dim: int,
    have: Sequence[Indices],
    want: Sequence[Indices],
    direction: str,
    who: str = "",
) -> Tensor:
    """Give every rank the indices along `dim` that it wants.

    Args:
        x: (*, have, *): this rank's indices of the whole.
        axis: the axis over which the ranks exchange indices.
        dim: the dim that is cut, counted from the front.
        have: ascending indices of every rank; together they are the whole, each once.
        want: ascending indices that every rank wants.
        direction: for the ledger.
        who: who asks, for messages.

    Returns:
        (*, want, *), Shard(dim), a new tensor.

    Raises:
        ShapeError: `x` is not what this rank has.

    Comm:
        `direction` one exchange of (*, size, *).
    """
    mine, needed = have[axis.rank], want[axis.rank]
    _check(x, axis, dim, len(mine), len(have), who or "an exchange")
    blocks = []
    for indices in want:
        positions = np.flatnonzero(np.isin(mine, indices, assume_unique=True))
        block = take(x, dim, slices_of(positions)).clone(memory_format=torch.contiguous_format)
        blocks.append(block.view(-1))
    places = [
        np.flatnonzero(np.isin(needed, theirs, assume_unique=True)) for theirs in have
    ]  # where what each rank sends lies in what this rank wants
    shapes = [(*x.shape[:dim], len(each), *x.shape[dim + 1 :]) for each in places]
    size = sum(map(len, have))
    whole = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    call = Call("exchange", direction, who, whole, x.dtype, f"{size} along dim {dim}")
    received = swap(blocks, [int(np.prod(shape)) for shape in shapes], axis, call)
    parts = [part.view(shape) for part, shape in zip(received, shapes, strict=True)]
    return join(parts, dim, [slices_of(each) for each in places])


def _check(x: Tensor, axis: Axis, dim: int, length: int, degree: int, who: str) -> None:
    if degree != axis.size or not 0 <= dim < x.dim() or x.shape[dim] != length:
        raise ShapeError(
            f"{who} on {axis}: got shape {tuple(x.shape)}, and along dim {dim} this rank has "
            f"{length} indices of a cut for degree {degree}. Give the tensor that the cut says."
        )
