"""An all-gather of parts whose lengths are given, where no `Cut` says who owns what.

`comm.all_gather` joins what a `Cut` gives to every rank. Indices that are cut by units (`units.py`)
lie in several runs, so a rank sends its runs side by side, and the caller puts the result in order.
Plain tensors. No autograd.
"""

import torch
from torch import Tensor

from shardproof import observing
from shardproof.axis import Axis
from shardproof.comm import as_flat
from shardproof.errors import ShapeError
from shardproof.observing import REPLICATE, Operand, shard
from shardproof.schedule import sizes_plan
from shardproof.told import count, sends_to_all, told_of


def all_gather_sizes(
    x: Tensor, axis: Axis, *, dim: int, sizes: tuple[int, ...], direction: str, who: str = ""
) -> Tensor:
    """Join the ranks' parts along `dim`, in rank order.

    Args:
        x: (*, sizes[axis.rank], *), Shard(dim).
        axis: the ranks.
        dim: along which the parts are joined, counted from the front.
        sizes: every rank's length along `dim`, the same on all ranks.
        direction: for the ledger.
        who: the layer that asks, for messages.
    Returns:
        (*, sum(sizes), *), Replicate, a new tensor.
    Raises:
        ShapeError: `x` does not have this rank's length.
    Comm:
        `direction` one all_gather of (*, sum(sizes), *).
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
    call, lengths, outer = sizes_plan(direction, who, before, after, x.dtype, sizes)
    y = x.new_empty(call.shape)
    axis.transport.all_gather(as_flat(x, call), y.view(-1), lengths, outer=outer, call=call)
    whole, num_bytes = y.numel() * y.element_size(), x.numel() * x.element_size()
    sent = (axis.size - 1) * num_bytes
    count(axis, call, whole, sent)
    if observing.is_on():
        part, joined = Operand("x", x, shard(dim)), Operand("y", y, REPLICATE)
        sends = sends_to_all(x, axis)
        observing.tell(told_of(axis, call, [part], joined, whole, sent, sends=sends))
    return y
