"""A sum over the ranks that is started now and awaited later: the step before the transport."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardproof import observing, operands, operators
from shardproof.axis import Axis
from shardproof.comm.plans import SumPlan
from shardproof.comm.reporting import count, tell_sum
from shardproof.observing import StepEvent
from shardproof.transport.base import Pending


class StartedSum:
    """A sum that has been started. Wait for it before anything else is sent on its axis.

    On a transport that is not asynchronous, the sum is complete when this object is returned.
    """

    def __init__(
        self, y: Tensor, pending: Pending | None = None, event: StepEvent | None = None
    ) -> None:
        self._y = y
        self._pending = pending
        self._event = event

    def wait(self) -> Tensor:
        """The sum, a new tensor; only the first call waits."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            if self._event is not None:
                observing.finish(self._event)
        return self._y


def start_planned(
    parts: Sequence[Tensor],
    axis: Axis,
    plan: SumPlan,
    like: Tensor,
    observed_part: Tensor | None = None,
) -> StartedSum:
    """Start a sum of which the plan is known.

    Args:
        parts: of this rank, as many as the plan says. They are given away: the sum may be written
            into a single one, and none may be written until the sum has been awaited.
        axis: the ranks, of which there are several.
        plan: of the sum.
        like: any tensor of the result's dtype and device.
        observed_part: for observers: the memory of the only part in the dtype of its bits.
    Returns:
        `plan.shape`, in `like`'s dtype, once it has been awaited.
    Comm:
        `direction` one collective, which `plan.call` describes.
    """
    if operators.is_recorded(like, *parts):
        return StartedSum(recorded_sum(parts, axis, plan, like))
    flat = [operands.as_flat(part, plan.call) for part in parts]
    is_free = plan.windows is None and len(parts) == 1 and parts[0].dtype == like.dtype
    y = parts[0] if is_free and operands.lies_flat(parts[0]) else like.new_empty(plan.shape)
    event = None
    if observing.is_on():
        event = tell_sum(
            axis,
            plan,
            parts if observed_part is None else [observed_part],
            y if observed_part is None else observed_part,
        )
    transport = axis.transport
    pending = transport.start_sum(
        flat, plan.order, y.view(-1), call=plan.call, windows=plan.windows
    )
    count(axis, plan.call, plan.message_bytes, plan.sent_bytes)
    started = StartedSum(y, pending, event)
    if not transport.is_asynchronous:  # an open sum was measured to cost more than it saves there
        started.wait()
    return started


def recorded_sum(parts: Sequence[Tensor], axis: Axis, plan: SumPlan, like: Tensor) -> Tensor:
    """`start_planned` and `wait`, called as an operator of torch. The parts are not written.

    Args:
        parts: of this rank.
        axis: the axis over which the ranks sum.
        plan: of the sum.
        like: any tensor of the result's dtype and device.
    Returns:
        `plan.shape`, in `like`'s dtype.
    Comm:
        `direction` one collective, which `plan.call` describes.
    """
    dtype, device = like.dtype, like.device

    def run(parts_now: list[Tensor], axis_now: Axis) -> list[Tensor]:
        # An operator may not write into what it was given.
        own = [parts_now[0].clone()] if len(parts_now) == 1 else parts_now
        empty = torch.empty(0, dtype=dtype, device=device)
        return [start_planned(own, axis_now, plan, empty).wait()]

    (y,) = operators.record(plan.call.kind, parts, [plan.shape], like, axis, run)
    return y
