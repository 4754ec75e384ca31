"""Sums over the ranks of an axis, on plain tensors. No autograd.

`all_reduce` and `reduce_scatter` take one partial per rank and add in the transport's own order
(native); `all_reduce_nodes` and `reduce_scatter_nodes` take canonical nodes and add in the order of
the tree, which does not depend on the degree. A sum can also be started, and awaited later.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardproof import operators
from shardproof.axis import Axis
from shardproof.comm.check import check_degree_of, check_part
from shardproof.comm.plans import ShardOf, native_plan, scatter_plan, tree_plan
from shardproof.comm.started import StartedSum, recorded_sum, start_planned
from shardproof.leaves import Cut
from shardproof.tree import Node, add_tensors, combine


def all_reduce(x: Tensor, axis: Axis, *, direction: str, who: str = "") -> Tensor:
    """Sum of the ranks' `x` in the transport's own order (native).

    Args:
        x: (*), Partial: one partial per rank.
        axis: the axis over which the ranks sum.
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
    x: Tensor, axis: Axis, *, direction: str, who: str = "", observed_part: Tensor | None = None
) -> StartedSum:
    """`all_reduce`, started, of a tensor that is given away: the sum is written into it.

    Args:
        x: (*), Partial, contiguous: one partial per rank, and afterwards the sum.
        axis: the axis over which the ranks sum.
        direction: for the ledger.
        who: the layer that asks, for messages.
        observed_part: for observers: the same memory in the dtype that its bits stand for.
    Returns:
        (*), Replicate, once it has been awaited.
    Comm:
        `direction` one all_reduce of (*).
    """
    if axis.size == 1:
        return StartedSum(x)
    plan = native_plan(direction, who, tuple(x.shape), x.dtype, axis.size)
    if operators.is_recorded(x):
        return StartedSum(x.copy_(recorded_sum([x], axis, plan, x)))
    return start_planned([x], axis, plan, x, observed_part)


def reduce_scatter(
    x: Tensor, axis: Axis, *, dim: int, cut: Cut, direction: str, who: str = ""
) -> Tensor:
    """Sum of the ranks' `x`, of which each rank gets its owned part, added in rank order (native).

    Args:
        x: (*, cut.size, *), Partial: one partial per rank.
        axis: the axis over which the ranks sum.
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
    into = ShardOf(tuple(x.shape), dim, cut)
    plan = scatter_plan(direction, who, into, x.dtype, None, axis.rank)
    return start_planned([x], axis, plan, x).wait()


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
        axis: the axis over which the ranks sum.
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
    started = start_all_reduce_nodes(
        nodes, axis, cut=cut, shape=shape, like=like, direction=direction, who=who
    )
    return started.wait()


def start_all_reduce_nodes(
    nodes: Mapping[Node, Tensor],
    axis: Axis,
    *,
    cut: Cut,
    shape: Sequence[int],
    like: Tensor,
    direction: str,
    who: str = "",
) -> StartedSum:
    """`all_reduce_nodes`, started.

    Args:
        nodes: node -> `shape`, as for `all_reduce_nodes`; none may be written until the sum has
            been awaited.
        axis: the axis over which the ranks sum.
        cut: of the dim that was contracted; its leaves are the tree's.
        shape: of the message.
        like: any tensor of the result's dtype and device.
        direction: for the ledger.
        who: the layer that asks, for messages.
    Returns:
        `shape`, Replicate, in `like`'s dtype, once it has been awaited.
    Comm:
        `direction` one all_reduce of (shape).
    """
    check_degree_of(cut, axis, who or "all_reduce")
    if axis.size == 1:
        return StartedSum(_whole(nodes, cut).to(like.dtype))
    plan = tree_plan(direction, who, tuple(shape), like.dtype, cut, axis.rank)
    return start_planned(list(nodes.values()), axis, plan, like)


def reduce_scatter_nodes(
    nodes: Mapping[Node, Tensor],
    axis: Axis,
    *,
    cut: Cut,
    into: ShardOf,
    like: Tensor,
    direction: str,
    who: str = "",
) -> Tensor:
    """Sum of all leaves by the canonical tree, of which each rank gets its owned part.

    Args:
        nodes: node -> `into.shape`, as for `all_reduce_nodes`.
        axis: the axis over which the ranks sum.
        cut: of the dim that was contracted; its leaves are the tree's.
        into: what each rank gets.
        like: any tensor of the result's dtype and device.
        direction: for the ledger.
        who: the layer that asks, for messages.
    Returns:
        (*, owned, *), Shard(into.dim), in `like`'s dtype.
    Comm:
        `direction` one reduce_scatter of (shape).
    """
    check_degree_of(cut, axis, who or "reduce_scatter")
    check_degree_of(into.cut, axis, who or "reduce_scatter")
    if axis.size == 1:
        return _whole(nodes, cut).to(like.dtype)
    plan = scatter_plan(direction, who, into, like.dtype, cut, axis.rank)
    return start_planned(list(nodes.values()), axis, plan, like).wait()


def _whole(nodes: Mapping[Node, Tensor], cut: Cut) -> Tensor:
    """The sum on one rank, which has all nodes."""
    return combine((0, cut.num_leaves), nodes, add_tensors)
