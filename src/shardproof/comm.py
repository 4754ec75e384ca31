"""Collectives on plain tensors. No autograd. Never writes into an input.

Two families: `all_reduce`, `reduce_scatter` take one partial per rank and add in the transport's
own order (native); `all_reduce_nodes`, `reduce_scatter_nodes` take canonical nodes and add in the
order of the tree, which does not depend on the degree. The rest only moves bytes. What is returned
is never a view: autograd forbids to write into a view that a Function has made. The two sums that
layers wait for can also be started, and waited for later.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shardproof import observing, operands, operators
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.leaves import Cut
from shardproof.numerics.matmul import node_dtype
from shardproof.observing import PARTIAL, REPLICATE, Operand, Placement, Told, shard
from shardproof.schedule import (
    GatherPlan,
    Plan,
    gather_plan,
    native_plan,
    scatter_plan,
    tree_plan,
    written_sum,
)
from shardproof.told import FREE_ORDER, count, sends_to_all, sends_whole, tell_sum, told_of
from shardproof.transport.base import Call, Pending
from shardproof.tree import Node, add_tensors, combine, node_name


class Sum:
    """A sum that has been started. Wait for it before anything else is sent on its axis.

    Where the transport is not asynchronous (`Transport.is_asynchronous`), it is there at once.
    """

    def __init__(self, y: Tensor, pending: Pending | None = None, told: Told | None = None) -> None:
        self._y = y
        self._pending = pending
        self._told = told

    def wait(self) -> Tensor:
        """The sum, a new tensor; only the first call waits."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            if self._told is not None:
                observing.finish(self._told)
        return self._y


def all_gather(
    x: Tensor, axis: Axis, *, dim: int, cut: Cut, direction: str, who: str = ""
) -> Tensor:
    """Join the ranks' owned parts along `dim`.

    Args:
        x: (*, owned, *), Shard(dim) as `cut` says.
        axis: the ranks.
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
        plan: from `schedule`.
        place: how `x` lies, for observers.
    Returns:
        (*, size, *), Replicate, a new tensor.
    Comm:
        `direction` one all_gather of (*, size, *).
    """
    call, sizes, outer = plan
    if operators.is_recorded(x):
        return _record(
            [x],
            call,
            call.shape,
            x,
            axis,
            lambda given, ranks, _: gather_parts(given[0], ranks, plan, place),
        )
    y = x.new_empty(call.shape)
    axis.transport.all_gather(operands.as_flat(x, call), y.view(-1), sizes, outer=outer, call=call)
    sent = (axis.size - 1) * _bytes(x)
    count(axis, call, _bytes(y), sent)
    if observing.is_on():
        part, whole = Operand("x", x, place), Operand("y", y, REPLICATE)
        sends = sends_to_all(x, axis)
        observing.tell(told_of(axis, call, [part], whole, _bytes(y), sent, sends=sends))
    return y


def all_reduce(x: Tensor, axis: Axis, *, direction: str, who: str = "") -> Tensor:
    """Sum of the ranks' `x` in the transport's own order (native).

    Args:
        x: (*), Partial: one partial per rank.
        axis: the ranks.
        direction: for the ledger.
        who: the layer that asks, for messages.
    Returns:
        (*), Replicate, a new tensor; its bits depend on the degree.
    Comm:
        `direction` one all_reduce of (*).
    """
    y = x.clone(memory_format=torch.contiguous_format)
    return start_all_reduce(y, axis, direction=direction, who=who).wait()


def start_all_reduce(
    x: Tensor, axis: Axis, *, direction: str, who: str = "", meant: Tensor | None = None
) -> Sum:
    """`all_reduce`, started, of a tensor that is given away: the sum is written into it.

    Args:
        x: (*), Partial, contiguous: one partial per rank, and afterwards the sum.
        axis: the ranks.
        direction: for the ledger.
        who: the layer that asks, for messages.
        meant: the same memory in the dtype that its bits stand for, for observers.
    Returns:
        (*), Replicate, once it has been waited for.
    Comm:
        `direction` one all_reduce of (*).
    """
    if axis.size == 1:
        return Sum(x)
    plan = native_plan(direction, who, tuple(x.shape), x.dtype, axis.size)
    if operators.is_recorded(x):
        again = functools.partial(start_all_reduce, direction=direction, who=who)
        total = _record(
            [x], plan.call, x.shape, x, axis, lambda given, ranks, _: again(_own(given)[0], ranks)
        )
        return Sum(x.copy_(total))
    operands.check_sent(x, plan.call)
    told = None
    if observing.is_on():
        seen = x if meant is None else meant
        told = tell_sum(axis, plan, [seen], seen, REPLICATE)
    return _start([x.view(-1)], plan, axis, x, told)


def reduce_scatter(
    x: Tensor, axis: Axis, *, dim: int, cut: Cut, direction: str, who: str = ""
) -> Tensor:
    """Sum of the ranks' `x`, of which each rank gets its owned part, added in rank order (native).

    Args:
        x: (*, cut.size, *), Partial: one partial per rank.
        axis: the ranks.
        dim: the dim that the result is cut along.
        cut: how.
        direction: for the ledger.
        who: the layer that asks, for messages.
    Returns:
        (*, owned, *), Shard(dim), a new tensor; its bits depend on the degree.
    Raises:
        ShapeError: `x` is not whole along `dim`.
    Comm:
        `direction` one reduce_scatter of (*, cut.size, *).
    """
    dim = check_part(x, axis, dim=dim, cut=cut, is_whole=True, who=who or "reduce_scatter")
    if axis.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    plan = scatter_plan(direction, who, tuple(x.shape), x.dtype, x.dtype, None, dim, cut, axis.rank)
    return _sum([x], x, axis, plan, dim=dim, dim_cut=cut)


def all_reduce_nodes(
    nodes: Mapping[Node, Tensor],
    axis: Axis,
    *,
    cut: Cut,
    shape: Sequence[int],
    like: Tensor,
    direction: str,
    who: str = "",
) -> Tensor:
    """Sum of all leaves, by the canonical tree, from the ranks' nodes.

    Args:
        nodes: node -> `shape`, in the node dtype; those of this rank's run, empty if it is idle.
            They are given away: the sum may be written into one, and at degree 1 the node is it.
        axis: the ranks.
        cut: of the dim that was contracted; its leaves are the tree's.
        shape: of the message.
        like: any tensor of the result's dtype and device.
        direction: for the ledger.
        who: the layer that asks, for messages.
    Returns:
        `shape`, Replicate, in `like`'s dtype: rounded once, after the last addition.
    Comm:
        `direction` one all_reduce of (shape).
    """
    return start_all_reduce_nodes(
        nodes, axis, cut=cut, shape=shape, like=like, direction=direction, who=who
    ).wait()


def start_all_reduce_nodes(
    nodes: Mapping[Node, Tensor],
    axis: Axis,
    *,
    cut: Cut,
    shape: Sequence[int],
    like: Tensor,
    direction: str,
    who: str = "",
) -> Sum:
    """`all_reduce_nodes`, started.

    Args:
        nodes: as there; not to be written until the sum has been waited for.
        axis: the ranks.
        cut: as there.
        shape: of the message.
        like: any tensor of the result's dtype and device.
        direction: for the ledger.
        who: the layer that asks, for messages.
    Returns:
        `shape`, Replicate, in `like`'s dtype, once it has been waited for.
    Comm:
        `direction` one all_reduce of (shape).
    """
    check_degree_of(cut, axis, who or "all_reduce")
    if axis.size == 1:
        return Sum(_sum_alone(nodes, cut, like, direction, who))
    plan = tree_plan(direction, who, tuple(shape), like.dtype, cut, axis.rank)
    parts = list(nodes.values())
    if operators.is_recorded(like, *parts):
        again = functools.partial(_sum_nodes, tuple(nodes), cut, plan)
        return Sum(_record(parts, plan.call, plan.shape, like, axis, again))
    flat = [operands.as_flat(part, plan.call) for part in parts]
    if len(parts) == 1 and operands.lies_flat(parts[0]) and parts[0].dtype == like.dtype:
        y = parts[0]
    else:
        y = like.new_empty(plan.shape)
    told = None
    if observing.is_on():
        additions = written_sum(cut)
        told = tell_sum(axis, plan, parts, y, REPLICATE, nodes=list(nodes), addition=additions)
    return _start(flat, plan, axis, y, told)


def reduce_scatter_nodes(
    nodes: Mapping[Node, Tensor],
    axis: Axis,
    *,
    cut: Cut,
    shape: Sequence[int],
    dim: int,
    dim_cut: Cut,
    like: Tensor,
    direction: str,
    who: str = "",
) -> Tensor:
    """Sum of all leaves by the canonical tree, of which each rank gets its owned part.

    Args:
        nodes: node -> `shape`, as for `all_reduce_nodes`.
        axis: the ranks.
        cut: of the dim that was contracted; its leaves are the tree's.
        shape: of the whole sum.
        dim: the dim that the result is cut along.
        dim_cut: how.
        like: any tensor of the result's dtype and device.
        direction: for the ledger.
        who: the layer that asks, for messages.
    Returns:
        (*, owned, *), Shard(dim), in `like`'s dtype.
    Comm:
        `direction` one reduce_scatter of (shape).
    """
    check_degree_of(cut, axis, who or "reduce_scatter")
    check_degree_of(dim_cut, axis, who or "reduce_scatter")
    if axis.size == 1:
        return _sum_alone(nodes, cut, like, direction, who)
    wide, dim = node_dtype(like.dtype), dim % len(shape)
    plan = scatter_plan(
        direction, who, tuple(shape), like.dtype, wide, cut, dim, dim_cut, axis.rank
    )
    parts = list(nodes.values())
    return _sum(parts, like, axis, plan, dim=dim, dim_cut=dim_cut, nodes=list(nodes), cut=cut)


def gather(
    x: Tensor, axis: Axis, *, sizes: Sequence[int], dst: int, direction: str, who: str = ""
) -> Tensor | None:
    """Bring the ranks' flat `x` together on one rank.

    Args:
        x: (sizes[rank],).
        axis: the ranks.
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
        given, sends = [Operand("x", x, shard(0))], [] if here else sends_whole([x], [dst])
        observing.tell(told_of(axis, call, given, output, whole, sent, sends=sends))
    return y


def check_degree_of(cut: Cut, axis: Axis, who: str) -> None:
    """Raise unless `cut` was made for the ranks of `axis`."""
    if cut.degree != axis.size:
        raise ShapeError(
            f"{who} on {axis}: the cut is for degree {cut.degree} and the axis has {axis.size} "
            f"ranks. Make it as Cut({cut.size}, leaves={cut.leaves}, degree=axis.size)."
        )


def check_part(x: Tensor, axis: Axis, *, dim: int, cut: Cut, is_whole: bool, who: str) -> int:
    """Raise unless `x` is, along `dim`, the whole of `cut` or what this rank owns of it.

    Args:
        x: (*, cut.size, *) if `is_whole`, else (*, owned, *).
        axis: the ranks.
        dim: counted from either end.
        cut: of that dim.
        is_whole: which of the two `x` should be.
        who: for the message.
    Returns:
        `dim`, counted from the front.
    Raises:
        ShapeError: `dim`, the cut or the length does not fit.
    """
    check_degree_of(cut, axis, who)
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(
            f"{who} on {axis}: dim {dim} wanted of a tensor of shape {tuple(x.shape)}, which has "
            f"{x.dim()} dims."
        )
    wanted = cut.size if is_whole else len(cut.owned(axis.rank))
    if x.shape[dim] != wanted:
        part = "is the whole" if is_whole else f"is what this rank owns of {cut.size}"
        raise ShapeError(
            f"{who} on {axis}: dim {dim} of shape {tuple(x.shape)} has {x.shape[dim]} units, "
            f"but {wanted} {part}. Give the tensor that the cut describes."
        )
    return dim % x.dim()


def _start(parts: list[Tensor], plan: Plan, axis: Axis, y: Tensor, told: Told | None) -> Sum:
    """Begin the sum of flat parts in `y`.

    It ends at once where the transport cannot work while its rank computes: there an open sum was
    measured to cost more than it saves.
    """
    pending = axis.transport.start_sum(parts, plan.order, y.view(-1), call=plan.call)
    count(axis, plan.call, plan.message_bytes, plan.sent_bytes)
    started = Sum(y, pending, told)
    if not axis.transport.is_asynchronous:
        started.wait()
    return started


def _sum(
    parts: Sequence[Tensor],
    like: Tensor,
    axis: Axis,
    plan: Plan,
    *,
    dim: int,
    dim_cut: Cut,
    nodes: Sequence[Node] | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """The sum of parts, cut along `dim`; `nodes` and `cut` say which leaves they sum."""
    if operators.is_recorded(like, *parts):
        again = functools.partial(_sum, plan=plan, dim=dim, dim_cut=dim_cut, nodes=nodes, cut=cut)
        return _record(
            parts, plan.call, plan.shape, like, axis, lambda given, ranks, y: again(given, y, ranks)
        )
    y = like.new_empty(plan.shape)
    told = None
    if observing.is_on():
        placement = shard(dim, dim_cut.owned(axis.rank), dim_cut.size)
        addition = FREE_ORDER if cut is None else written_sum(cut)
        told = tell_sum(axis, plan, parts, y, placement, nodes=nodes, addition=addition)
    flat = [operands.as_flat(part, plan.call) for part in parts]
    axis.transport.sum(flat, plan.order, y.view(-1), windows=plan.windows, call=plan.call)
    count(axis, plan.call, plan.message_bytes, plan.sent_bytes)
    if told is not None:
        observing.finish(told)
    return y


def _record(
    parts: Sequence[Tensor],
    call: Call,
    shape: Sequence[int],
    like: Tensor,
    axis: Axis,
    collective: Callable[[list[Tensor], Axis, Tensor], Tensor | Sum],
) -> Tensor:
    """What `collective(parts, axis, like)` returns, called as an operator of torch."""
    dtype, device = like.dtype, like.device

    def run(given: list[Tensor], ranks: Axis) -> list[Tensor]:
        y = collective(given, ranks, torch.empty(0, dtype=dtype, device=device))
        return [y.wait() if isinstance(y, Sum) else y]

    (y,) = operators.record(call.kind, parts, [shape], like, axis, run)
    return y


def _sum_nodes(
    names: tuple[Node, ...],
    cut: Cut,
    plan: Plan,
    parts: list[Tensor],
    axis: Axis,
    like: Tensor,
) -> Sum:
    """`start_all_reduce_nodes` of parts that are not given away."""
    return start_all_reduce_nodes(
        dict(zip(names, _own(parts), strict=True)),
        axis,
        cut=cut,
        shape=plan.shape,
        like=like,
        direction=plan.call.direction,
        who=plan.call.who,
    )


def _own(parts: list[Tensor]) -> list[Tensor]:
    """Parts of which the only one may be written to."""
    return [parts[0].clone()] if len(parts) == 1 else parts


def _sum_alone(
    nodes: Mapping[Node, Tensor], cut: Cut, like: Tensor, direction: str, who: str
) -> Tensor:
    """The sum on one rank, which has all nodes."""
    y = combine((0, cut.num_leaves), nodes, add_tensors).to(like.dtype)
    if observing.is_on() and len(nodes) > 1:
        inputs = [Operand(node_name(node), part, PARTIAL, node) for node, part in nodes.items()]
        output = Operand("y", y, REPLICATE)
        observing.tell(Told("addition", direction, who, written_sum(cut), inputs, output))
    return y


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
