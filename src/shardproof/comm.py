"""Collectives on plain tensors. No autograd. Never writes into an input.

Two families: `all_reduce`, `reduce_scatter` take one partial per rank and add in the transport's
own order (native); `all_reduce_nodes`, `reduce_scatter_nodes` take canonical nodes and add in the
order of the tree, which does not depend on the degree. The rest only moves bytes. What is returned
is never a view: autograd forbids to write into a view that a Function has made.

The tree sum is an all-to-all and a gather: each rank receives its slice of every node, finishes
the tree on that slice, and the slices are gathered. At powers of two a rank has one node, and the
bytes are those of a ring; no buffer is larger than the message.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.axis import Axis
from shardproof.errors import MismatchError, ShapeError
from shardproof.leaves import Cut, share
from shardproof.numerics.matmul import node_dtype
from shardproof.transport.base import Call
from shardproof.tree import Node, add_tensors, combine, nodes_of_run

Pieces = Callable[[Tensor, int], Tensor]  # (tensor, rank) -> the 1-D contiguous part for that rank


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
    shape = (*x.shape[:dim], cut.size, *x.shape[dim + 1 :])
    call = Call("all_gather", direction, who, shape, x.dtype, _describe(cut, dim))
    per_unit = x.numel() // x.shape[dim] if x.shape[dim] else _numel(shape) // cut.size
    sizes = [length * per_unit for length in cut.sizes()]
    y = x.new_empty(shape)
    axis.transport.all_gather(_private(x), y.view(-1), sizes, call=call)
    _count(axis, call, _bytes(y), (axis.size - 1) * _bytes(x))
    if _numel(shape[:dim]) == 1:
        return y
    parts = [
        part.view(*shape[:dim], length, *shape[dim + 1 :])
        for part, length in zip(y.view(-1).split(sizes), cut.sizes(), strict=True)
    ]
    return torch.cat(parts, dim)


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
    if axis.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    call = Call("all_reduce", direction, who, tuple(x.shape), x.dtype)
    y = axis.transport.all_reduce(_private(x), call=call)
    _count(axis, call, _bytes(x), 2 * (axis.size - 1) * _bytes(x) // axis.size)
    return y.resize_(x.shape)


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
    call = Call("reduce_scatter", direction, who, tuple(x.shape), x.dtype, _describe(cut, dim))
    mine = {(axis.rank, axis.rank + 1): _private(x).view(x.shape)}
    owners = [[(rank, rank + 1)] for rank in range(axis.size)]
    parts, sent = _swap(mine, owners, axis, _owned_parts(dim, cut), like=x, call=call)
    _count(axis, call, _bytes(x), sent)
    total = parts[0, 1].clone()
    for rank in range(1, axis.size):
        total.add_(parts[rank, rank + 1])
    return total.resize_(_part_shape(x.shape, dim, cut, axis.rank))


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
            They are given away: other ranks read them, and at degree 1 the node is the result.
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
    check_degree_of(cut, axis, who or "all_reduce")
    root = (0, cut.num_leaves)
    if axis.size == 1:
        return combine(root, nodes, add_tensors).to(like.dtype)
    call = Call("all_reduce", direction, who, tuple(shape), like.dtype, _describe(cut))
    bounds = share(_numel(shape), axis.size)

    def piece(x: Tensor, rank: int) -> Tensor:
        return x.reshape(-1)[bounds[rank].start : bounds[rank].stop]

    wide = like.new_empty(0, dtype=node_dtype(like.dtype))
    parts, sent = _swap(nodes, _owners(cut), axis, piece, like=wide, call=call)
    mine = combine(root, parts, add_tensors).to(like.dtype)
    y = like.new_empty(tuple(shape))
    axis.transport.all_gather(mine, y.view(-1), [len(bound) for bound in bounds], call=call)
    _count(axis, call, _bytes(y), sent + (axis.size - 1) * _bytes(mine))
    return y


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
    root = (0, cut.num_leaves)
    local = _part_shape(shape, dim, dim_cut, axis.rank)
    if axis.size == 1:
        return combine(root, nodes, add_tensors).to(like.dtype)
    detail = f"{_describe(cut)} to {_describe(dim_cut, dim)}"
    call = Call("reduce_scatter", direction, who, tuple(shape), like.dtype, detail)
    piece = _owned_parts(dim, dim_cut)
    wide = like.new_empty(0, dtype=node_dtype(like.dtype))
    parts, sent = _swap(nodes, _owners(cut), axis, piece, like=wide, call=call)
    _count(axis, call, _numel(shape) * like.element_size(), sent)
    mine = combine(root, parts, add_tensors).to(like.dtype)
    return (mine.clone() if root in parts else mine).resize_(local)


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
    outgoing = [[_private(x)] if rank == dst and not here else [] for rank in range(axis.size)]
    incoming = [[size] if here and rank != dst else [] for rank, size in enumerate(sizes)]
    parts = axis.transport.exchange(outgoing, incoming, like=x, call=call, rounds=1)
    _count(axis, call, sum(sizes) * x.element_size(), 0 if here else _bytes(x))
    if not here:
        return None
    own: list[list[Tensor]] = [[x] if rank == dst else parts[rank] for rank in range(axis.size)]
    return torch.cat([part.reshape(-1) for pieces in own for part in pieces])


def agree(
    value: Mapping[str, Any],
    axis: Axis,
    *,
    what: str,
    way_out: str = "Give every rank the same.",
) -> None:
    """Raise on all ranks unless all have the same `value`.

    Args:
        value: name -> what must be the same; small, picklable, comparable.
        axis: the ranks.
        what: all of it in a word, for the message.
        way_out: the end of the message.

    Raises:
        MismatchError: names the first rank that differs from rank 0, the first entry in which it
            does, and both sides of that.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    values = axis.transport.gather_objects(dict(value), call=Call("agree", "setup", what))
    for rank, other in enumerate(values):
        if other == values[0]:
            continue
        names = [*values[0], *(name for name in other if name not in values[0])]
        differing = [name for name in names if values[0].get(name) != other.get(name)]
        first, more = differing[0], len(differing) - 1
        raise MismatchError(
            f"the ranks of axis {axis.name!r} were given different {what}: for {first}, rank 0 has "
            f"{values[0].get(first, 'nothing')}, rank {rank} has {other.get(first, 'nothing')}"
            + (f"; {more} more {'differs' if more == 1 else 'differ'}" if more else "")
            + f". {way_out}"
        )


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


def _swap(
    nodes: Mapping[Node, Tensor],
    owners: Sequence[Sequence[Node]],
    axis: Axis,
    piece: Pieces,
    *,
    like: Tensor,
    call: Call,
) -> tuple[dict[Node, Tensor], int]:
    """All-to-all: this rank's piece of every rank's nodes, and how many bytes it sent.

    `like` has the dtype of the nodes, which an idle rank cannot ask a node for.
    """
    others = [rank for rank in range(axis.size) if rank != axis.rank]
    outgoing: list[list[Tensor]] = [[] for _ in range(axis.size)]
    incoming: list[list[int]] = [[] for _ in range(axis.size)]
    # Asked of a tensor without memory, for an idle rank has no node to ask.
    length = piece(torch.empty(call.shape, device="meta"), axis.rank).numel()
    for rank in others:
        outgoing[rank] = [piece(x, rank) for x in nodes.values()]
        incoming[rank] = [length] * len(owners[rank])
    rounds = max(len(owned) for owned in owners)
    received = axis.transport.exchange(outgoing, incoming, like=like, call=call, rounds=rounds)
    parts = {node: piece(x, axis.rank) for node, x in nodes.items()}
    for rank in others:
        parts.update(zip(owners[rank], received[rank], strict=True))
    return parts, sum(_bytes(x) for pieces in outgoing for x in pieces)


def _owned_parts(dim: int, cut: Cut) -> Pieces:
    def piece(x: Tensor, rank: int) -> Tensor:
        owned = cut.owned(rank)
        return x.narrow(dim, owned.start, len(owned)).reshape(-1)

    return piece


def _part_shape(shape: Sequence[int], dim: int, cut: Cut, rank: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[dim] = len(cut.owned(rank))
    return tuple(sizes)


def _owners(cut: Cut) -> list[list[Node]]:
    return [nodes_of_run(cut.num_leaves, cut.run(rank)) for rank in range(cut.degree)]


def _private(x: Tensor) -> Tensor:
    """A flat copy that nobody else writes: a transport may lend it to other ranks."""
    return x.clone(memory_format=torch.contiguous_format).view(-1)


def _count(axis: Axis, call: Call, message_bytes: int, sent_bytes: int) -> None:
    axis.transport.ledger.add(
        call.direction, call.kind, message_bytes=message_bytes, sent_bytes=sent_bytes
    )


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _describe(cut: Cut, dim: int | None = None) -> str:
    along = "" if dim is None else f" along dim {dim}"
    return f"{cut.size} units in {cut.num_leaves} leaves{along}"


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
