"""A collective, as the ledger of its axis counts it and as observers see it."""

from collections.abc import Sequence

from torch import Tensor

from shardproof import observing
from shardproof.axis import Axis
from shardproof.observing import PARTIAL, Operand, Placement, Told
from shardproof.schedule import Plan
from shardproof.transport.base import Call

_FREE_ORDER = "the ranks' parts, in the transport's own order"


def count(
    axis: Axis, call: Call, message_bytes: int, sent_bytes: int, *, is_rest: bool = False
) -> None:
    """Count a collective in the ledger of the axis.

    Args:
        axis: that it crossed.
        call: what it was.
        message_bytes: of its result.
        sent_bytes: by this rank.
        is_rest: a further part of a collective that has been counted.
    """
    axis.transport.ledger.add(
        call.direction,
        call.kind,
        message_bytes=message_bytes,
        sent_bytes=sent_bytes,
        calls=0 if is_rest else 1,
    )


def told_of(
    axis: Axis,
    call: Call,
    inputs: Sequence[Operand],
    output: Operand | None,
    message_bytes: int,
    sent_bytes: int,
    *,
    is_rest: bool = False,
) -> Told:
    """A collective, as observers are told of it; the ledger counts the same figures.

    Args:
        axis: that it crossed.
        call: what it was.
        inputs: what this rank gave.
        output: what this rank got, or None.
        message_bytes: of its result.
        sent_bytes: by this rank.
        is_rest: a further part of a collective that has been told.
    """
    return Told(
        call.kind,
        call.direction,
        call.who,
        call.detail,
        inputs,
        output,
        message_bytes=message_bytes,
        sent_bytes=sent_bytes,
        is_collective=True,
        is_rest=is_rest,
        axis=axis.name,
    )


def tell_sum(
    axis: Axis,
    plan: Plan,
    parts: Sequence[Tensor],
    y: Tensor,
    placement: Placement,
    *,
    labels: Sequence[str] = ("x",),
    addition: str = _FREE_ORDER,
    is_rest: bool = False,
) -> Told:
    """Tell of a sum before it begins: it may be written into one of its parts.

    Args:
        axis: that it crosses.
        plan: of the sum.
        parts: of this rank, each Partial.
        y: where the sum will lie.
        placement: of the sum.
        labels: what the parts are called.
        addition: which parts of all ranks are added, in which order.
        is_rest: a further part of a collective that has been told.
    Returns:
        What to finish once the sum is there.
    """
    inputs = [Operand(label, part, PARTIAL) for label, part in zip(labels, parts, strict=True)]
    name = "grad_x" if plan.call.direction == "backward" else "y"
    output = Operand(name, y, placement)
    told = told_of(
        axis, plan.call, inputs, output, plan.message_bytes, plan.sent_bytes, is_rest=is_rest
    )
    told.addition = addition
    observing.tell(told)
    return told
