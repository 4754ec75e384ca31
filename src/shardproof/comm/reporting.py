"""What the ledger of an axis counts of a collective, and what observers are told of it."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from shardproof import observing
from shardproof.axis import Axis
from shardproof.comm.plans import SumPlan, written_sum
from shardproof.leaves import share
from shardproof.numerics.precision import node_dtype
from shardproof.observing import PARTIAL, Operand, Sending, StepEvent
from shardproof.transport.base import Call
from shardproof.tree import node_name, nodes_of_run

FREE_ORDER = "the ranks' parts, in the transport's own order"


def count(axis: Axis, call: Call, message_bytes: int, sent_bytes: int) -> None:
    """Count a collective in the ledger of the axis.

    Args:
        axis: that it crossed.
        call: what it was.
        message_bytes: of its result.
        sent_bytes: by this rank.
    """
    axis.transport.ledger.add(
        call.direction,
        call.kind,
        message_bytes=message_bytes,
        sent_bytes=sent_bytes,
    )


def step_event(
    axis: Axis,
    call: Call,
    inputs: Sequence[Operand],
    output: Operand | None,
    message_bytes: int,
    sent_bytes: int,
    *,
    sends: Sequence[Sending] = (),
) -> StepEvent:
    """A collective, as observers are told of it; the ledger counts the same figures.

    Args:
        axis: that it crossed.
        call: what it was.
        inputs: what this rank gave.
        output: what this rank got, or None.
        message_bytes: of its result.
        sent_bytes: by this rank.
        sends: to whom this rank sends which part, if not the transport decides.
    """
    return StepEvent(
        call.kind,
        call.direction,
        call.who,
        call.detail,
        inputs,
        output,
        message_bytes=message_bytes,
        sent_bytes=sent_bytes,
        is_collective=True,
        axis=axis.name,
        sends=sends,
    )


def sends_whole(parts: Sequence[Tensor], receivers: Sequence[int]) -> list[Sending]:
    """Each of these parts goes whole to the rank of the same place; empty ones are not sent."""
    return [
        Sending(
            receiver,
            source,
            start=0,
            stop=part.numel(),
            num_bytes=part.numel() * part.element_size(),
        )
        for source, (part, receiver) in enumerate(zip(parts, receivers, strict=True))
        if part.numel()
    ]


def sends_to_all(x: Tensor, axis: Axis) -> list[Sending]:
    """This rank sends the whole of `x` to every other rank; nothing if it is empty."""
    size = x.numel() * x.element_size()
    others = [rank for rank in range(axis.size) if rank != axis.rank]
    return [Sending(rank, 0, start=0, stop=x.numel(), num_bytes=size) for rank in others if size]


def sends_of_sum(plan: SumPlan, axis: Axis) -> Iterator[Sending]:
    """The parts that this rank sends, and their receivers; empty if the transport decides.

    In a sum by the tree, a rank sends a slice of its nodes to the rank that adds it. In an
    all-reduce it then sends the slice that it has added to all. It yields nothing for a sum
    in the transport's own order.

    Args:
        plan: of the sum.
        axis: that it crosses.
    """
    dtype, num_parts = plan.call.dtype, plan.order.counts[axis.rank]
    if plan.order.is_free or dtype is None:
        return
    wide = node_dtype(dtype).itemsize
    others = [rank for rank in range(axis.size) if rank != axis.rank]
    if plan.windows is not None:
        for rank in others:
            window = plan.windows[rank]
            for source in range(num_parts if window.numel else 0):
                yield Sending(
                    rank,
                    source,
                    start=window.start,
                    stop=window.stop,
                    num_bytes=window.numel * wide,
                    dim=plan.placement.dim,
                )
        return
    slices = share(math.prod(plan.shape), axis.size)
    for rank in others:
        at = slices[rank]
        for source in range(num_parts if at else 0):
            size = len(at) * wide
            yield Sending(rank, source, start=at.start, stop=at.stop, num_bytes=size)
    mine = slices[axis.rank]
    for rank in others if mine else ():
        size = len(mine) * dtype.itemsize
        yield Sending(rank, None, start=mine.start, stop=mine.stop, num_bytes=size)


def tell_sum(axis: Axis, plan: SumPlan, parts: Sequence[Tensor], y: Tensor) -> StepEvent:
    """Tell of a sum before it begins: it may be written into one of its parts.

    Args:
        axis: that it crosses.
        plan: of the sum.
        parts: of this rank, each Partial.
        y: where the sum will lie.
    Returns:
        What to finish once the sum is there.
    """
    if plan.cut is None:
        inputs = [Operand("x", part, PARTIAL) for part in parts]
    else:
        nodes = nodes_of_run(plan.cut.num_leaves, plan.cut.run(plan.rank))
        inputs = [
            Operand(node_name(node), part, PARTIAL, node)
            for node, part in zip(nodes, parts, strict=True)
        ]
    name = "grad_x" if plan.call.direction == "backward" else "y"
    event = step_event(
        axis,
        plan.call,
        inputs,
        Operand(name, y, plan.placement),
        plan.message_bytes,
        plan.sent_bytes,
        sends=tuple(sends_of_sum(plan, axis)),
    )
    event.addition = FREE_ORDER if plan.cut is None else written_sum(plan.cut)
    observing.tell(event)
    return event
