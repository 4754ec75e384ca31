"""Gathers over the ranks of an axis, on plain tensors. No autograd, and nothing is computed.

What is returned is never a view: autograd forbids to write into a view that a Function has made.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardproof import observing, operands, operators
from shardproof.axis import Axis
from shardproof.comm.check import check_part
from shardproof.comm.plans import GatherPlan, gather_plan
from shardproof.comm.reporting import count, sends_to_all, sends_whole, step_event
from shardproof.leaves import Cut
from shardproof.observing import REPLICATE, Operand, Placement, shard
from shardproof.transport.base import Call


def all_gather(
    x: Tensor, axis: Axis, *, dim: int, cut: Cut, direction: str, who: str = ""
) -> Tensor:
    """Join the ranks' owned parts along `dim`.

    Args:
        x: (*, owned, *), Shard(dim) as `cut` says.
        axis: the axis over which the ranks gather.
        dim: the dim that is cut.
        cut: how it is cut.
        direction: for the ledger: "forward", "backward", "update", "setup" or "prover".
        who: the layer that asks, for messages.
    Returns:
        (*, cut.size, *), Replicate, a new tensor.
    Raises:
        ShapeError: `x` is not what this rank owns.
    Comm:
        `direction` one all_gather of (*, cut.size, *).
    """
    dim = check_part(x, axis, dim=dim, cut=cut, is_whole=False, who=who or "all_gather")
    if axis.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    before, after = tuple(x.shape[:dim]), tuple(x.shape[dim + 1 :])
    plan = gather_plan(direction, who, before, after, x.dtype, cut)
    return gather_parts(x, axis, plan, shard(dim, cut.owned(axis.rank), cut.size))


def gather_parts(x: Tensor, axis: Axis, plan: GatherPlan, place: Placement) -> Tensor:
    """Join the ranks' parts in rank order, as `plan` says.

    Args:
        x: (*, owned, *), Shard.
        axis: the ranks, of which there are several.
        plan: from `gather_plan` or `sizes_plan`.
        place: how `x` lies, for observers.
    Returns:
        (*, size, *), Replicate, a new tensor.
    Comm:
        `direction` one all_gather of (*, size, *).
    """
    call, sizes, outer = plan
    if operators.is_recorded(x):

        def run(parts: list[Tensor], axis_now: Axis) -> list[Tensor]:
            return [gather_parts(parts[0], axis_now, plan, place)]

        (whole_x,) = operators.record(call.kind, [x], [call.shape], x, axis, run)
        return whole_x
    y = x.new_empty(call.shape)
    axis.transport.all_gather(operands.as_flat(x, call), y.view(-1), sizes, outer=outer, call=call)
    sent = (axis.size - 1) * _bytes(x)
    count(axis, call, _bytes(y), sent)
    if observing.is_on():
        part, whole = Operand("x", x, place), Operand("y", y, REPLICATE)
        sends = sends_to_all(x, axis)
        observing.tell(step_event(axis, call, [part], whole, _bytes(y), sent, sends=sends))
    return y


def gather(
    x: Tensor, axis: Axis, *, sizes: Sequence[int], dst: int, direction: str, who: str = ""
) -> Tensor | None:
    """Bring the ranks' flat `x` together on one rank.

    Args:
        x: (sizes[rank],).
        axis: the axis over which the ranks gather.
        sizes: every rank's length.
        dst: the rank that receives.
        direction: for the ledger.
        who: who asks, for messages.
    Returns:
        (sum(sizes),) on `dst`, a new tensor; None elsewhere.
    Comm:
        `direction` one gather of (sum of sizes).
    """
    if axis.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    call = Call("gather", direction, who, (sum(sizes),), x.dtype, f"to rank {dst}")
    here = axis.rank == dst
    # A copy: an exchange may lend it for longer than this call.
    mine = x.clone(memory_format=torch.contiguous_format).view(-1)
    outgoing = [[mine] if rank == dst and not here else [] for rank in range(axis.size)]
    incoming = [[size] if here and rank != dst else [] for rank, size in enumerate(sizes)]
    parts = axis.transport.exchange(outgoing, incoming, like=x, call=call, rounds=1)
    whole, sent = sum(sizes) * x.element_size(), 0 if here else _bytes(x)
    count(axis, call, whole, sent)
    y = None
    if here:
        own: list[list[Tensor]] = [[x] if rank == dst else parts[rank] for rank in range(axis.size)]
        y = torch.cat([operands.as_flat(part, call) for pieces in own for part in pieces])
    if observing.is_on():
        output = None if y is None else Operand("y", y)
        inputs, sends = [Operand("x", x, shard(0))], [] if here else sends_whole([x], [dst])
        observing.tell(step_event(axis, call, inputs, output, whole, sent, sends=sends))
    return y


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
