"""Redistribute a matrix that is cut along one dim to a cut along the other, by one all-to-all.

Every rank sends each other rank the block in which its rows and the other's columns cross. So no
buffer is larger than a rank's part. Nothing is computed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shardproof import observing, operators
from shardproof.axis import Axis
from shardproof.comm.check import check_degree_of
from shardproof.comm.reporting import count, sends_whole, step_event
from shardproof.errors import ShapeError
from shardproof.leaves import Cut
from shardproof.observing import Operand
from shardproof.transport.base import Call


def to_columns(
    x: Tensor, axis: Axis, *, rows: Cut, columns: Cut, direction: str, who: str = ""
) -> Tensor:
    """Give every rank its owned columns for its owned rows.

    Args:
        x: (owned rows, columns.size), Shard(0).
        axis: the ranks that share the tensor.
        rows: the cut of dim 0 before.
        columns: the cut of dim 1 afterwards.
        direction: direction in the ledger.
        who: name of the caller, for messages.

    Returns:
        (rows.size, owned columns), Shard(1), a new tensor.

    Raises:
        ShapeError: `x` does not have the shape of this rank's part.

    Comm:
        `direction` one exchange of (rows.size, columns.size).
    """
    _check(x, (len(rows.owned(axis.rank)), columns.size), axis, who, rows, columns)
    blocks = [_copy(x[:, _slice(columns.owned(rank))]) for rank in range(axis.size)]
    width = len(columns.owned(axis.rank))
    heights = rows.sizes()
    call = _call(x, rows, columns, direction, who)
    received = swap(blocks, [height * width for height in heights], axis, call)
    return torch.cat([part.view(-1, width) if width else part.view(height, 0)
                      for part, height in zip(received, heights, strict=True)])  # fmt: skip


def to_rows(
    x: Tensor,
    axis: Axis,
    *,
    rows: Cut,
    columns: Cut,
    held: Sequence[range],
    direction: str,
    who: str = "",
) -> Tensor:
    """Give every rank the rows that it holds for its owned columns.

    Args:
        x: (rows.size, owned columns), Shard(1).
        axis: the ranks that share the tensor.
        rows: the cut of dim 0 afterwards.
        columns: the cut of dim 1 before.
        held: the leaves of `rows` that each rank holds, in rank order.
        direction: direction in the ledger.
        who: name of the caller, for messages.

    Returns:
        (held rows, columns.size), Shard(0), a new tensor.

    Raises:
        ShapeError: `x` does not have the shape of this rank's part.

    Comm:
        `direction` one exchange of (rows.size, columns.size).
    """
    _check(x, (rows.size, len(columns.owned(axis.rank))), axis, who, rows, columns)
    blocks = [_copy(x[_slice(rows.units(leaves))]) for leaves in held]
    height = len(rows.units(held[axis.rank]))
    widths = columns.sizes()
    call = _call(x, rows, columns, direction, who)
    received = swap(blocks, [height * width for width in widths], axis, call)
    return torch.cat(
        [part.view(height, width) for part, width in zip(received, widths, strict=True)], dim=1
    )


def _call(x: Tensor, rows: Cut, columns: Cut, direction: str, who: str) -> Call:
    detail = f"{rows.num_leaves} x {columns.num_leaves} leaves"
    return Call("exchange", direction, who, (rows.size, columns.size), x.dtype, detail)


def swap(blocks: list[Tensor], sizes: list[int], axis: Axis, call: Call) -> list[Tensor]:
    """Send one block to every rank and receive one from every rank, also from this one.

    Args:
        blocks: flat, contiguous copies: an exchange may read them after the call.
        sizes: number of elements that come from each rank.
        axis: the ranks that share the tensor.
        call: description for the ledger and messages; its shape is that of the whole.

    Comm:
        `direction` one exchange of (whole).
    """
    mine = blocks[axis.rank]
    if operators.is_recorded(*blocks):
        shapes = [(size,) for size in sizes]
        return operators.record(
            call.kind,
            blocks,
            shapes,
            mine,
            axis,
            lambda parts, ranks: [
                part.clone() for part in swap([each.clone() for each in parts], sizes, ranks, call)
            ],
        )
    if axis.size > 1:
        outgoing = [[] if rank == axis.rank else [block] for rank, block in enumerate(blocks)]
        incoming = [[] if rank == axis.rank else [size] for rank, size in enumerate(sizes)]
        parts = axis.transport.exchange(outgoing, incoming, like=mine, call=call, rounds=1)
    else:
        parts = [[]]
    item = mine.element_size()
    whole = math.prod(call.shape) * item
    sent = item * (sum(block.numel() for block in blocks) - mine.numel())
    count(axis, call, whole, sent)
    if observing.is_on():
        inputs = [Operand(f"to rank {rank}", block) for rank, block in enumerate(blocks)]
        sends = [
            each for each in sends_whole(blocks, range(axis.size)) if each.receiver != axis.rank
        ]
        observing.tell(step_event(axis, call, inputs, None, whole, sent, sends=sends))
    return [mine if rank == axis.rank else part[0] for rank, part in enumerate(parts)]


def _copy(x: Tensor) -> Tensor:
    """A flat copy, because an exchange may read it after the call."""
    return x.clone(memory_format=torch.contiguous_format).view(-1)


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)


def _check(
    x: Tensor, shape: tuple[int, int], axis: Axis, who: str, rows: Cut, columns: Cut
) -> None:
    for cut in (rows, columns):
        check_degree_of(cut, axis, who or "an exchange")
    if tuple(x.shape) != shape:
        raise ShapeError(
            f"{who or 'an exchange'} on {axis}: got shape {tuple(x.shape)}, but this rank owns "
            f"{shape} of ({rows.size}, {columns.size}). Give the tensor that the cuts describe."
        )
