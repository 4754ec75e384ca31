"""Collectives on plain tensors along a dim that has several blocks of units.

What a rank gives is what it holds; of shared units the owner's copy travels. Nothing is computed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.observing import shard
from shardproof.recut import swap
from shardproof.runs import join, take
from shardproof.schedule import block_gather_plan
from shardproof.transport.base import Call
from shardproof.units import CutDim, Indices, slices_of


def all_gather_along(
    x: Tensor, axis: Axis, *, dim: int, along: CutDim, direction: str, who: str = ""
) -> Tensor:
    """Join what the ranks own along `dim`, in the order of the whole.

    Args:
        x: (*, held, *), what this rank holds.
        axis: the ranks.
        dim: the dim that is cut, counted from the front.
        along: how it is cut.
        direction: for the ledger.
        who: the layer that asks, for messages.

    Returns:
        (*, along.size, *), Replicate, a new tensor.

    Raises:
        ShapeError: `x` is not what this rank holds.

    Comm:
        `direction` one all_gather of (*, along.size, *).
    """
    who = who or "all_gather"
    _check(x, axis, dim, len(along.held(axis.rank)), along.shared.degree, who)
    if axis.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    shape = (*x.shape[:dim], along.size, *x.shape[dim + 1 :])
    owned = take(x, dim, along.owned_places(axis.rank))
    plan = block_gather_plan(direction, who, shape, x.dtype, dim, along)
    y = comm.gather_parts(owned, axis, plan, shard(dim, None, along.size))
    places = along.places_in_rank_order
    return y if places is None else y.index_select(dim, torch.from_numpy(places).to(y.device))


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
        axis: the ranks.
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
    mine, asked = have[axis.rank], want[axis.rank]
    _check(x, axis, dim, len(mine), len(have), who or "an exchange")
    blocks = []
    for wanted in want:
        found = np.flatnonzero(np.isin(mine, wanted, assume_unique=True))
        block = take(x, dim, slices_of(found)).clone(memory_format=torch.contiguous_format)
        blocks.append(block.view(-1))
    places = [
        np.flatnonzero(np.isin(asked, theirs, assume_unique=True)) for theirs in have
    ]  # where what each rank sends lies in what this rank wants
    shapes = [(*x.shape[:dim], len(each), *x.shape[dim + 1 :]) for each in places]
    size = sum(map(len, have))
    whole = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    call = Call("exchange", direction, who, whole, x.dtype, f"{size} along dim {dim}")
    got = swap(blocks, [int(np.prod(shape)) for shape in shapes], axis, call)
    parts = [part.view(shape) for part, shape in zip(got, shapes, strict=True)]
    return join(parts, dim, [slices_of(each) for each in places])


def _check(x: Tensor, axis: Axis, dim: int, length: int, degree: int, who: str) -> None:
    if degree != axis.size or not 0 <= dim < x.dim() or x.shape[dim] != length:
        raise ShapeError(
            f"{who} on {axis}: got shape {tuple(x.shape)}, and along dim {dim} this rank has "
            f"{length} indices of a cut for degree {degree}. Give the tensor that the cut says."
        )
