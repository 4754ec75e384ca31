"""SHA-256 of a full tensor's bytes in row-major order, however the tensor is cut.

A sharded tensor is gathered to rank 0 in blocks of rows, none of them larger than a rank's share,
so the full tensor is never in one place. The hash at any degree is the one that `hashlib` gives
for the bytes of the full tensor. Only small tensors, which are to be shown, are gathered whole.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardproof import comm
from shardproof.axis import Axis
from shardproof.index_runs import join, take
from shardproof.leaves import Layout

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK_BYTES = 1 << 22  # of one rank's own memory that is fed at once


def hash_tensor(tensor: Tensor, layout: Layout, axis: Axis, *, who: str) -> str | None:
    """SHA-256 of the full tensor.

    Args:
        tensor: layout.local_shape, Shard(layout.dim) or Replicate.
        layout: how it lies on this rank.
        axis: whose ranks hold it; all of them call this.
        who: what it is, for messages.
    Returns:
        Of a sharded tensor: the hash on rank 0, None on the others. Of a replicated one: the hash
        of the rank's own copy on every rank, to be compared with the others'.
    Comm:
        gathers to rank 0 in direction "prover", each of at most one rank's share.
    """
    hasher = hashlib.sha256()
    part = owned_part(tensor.detach(), layout)
    if layout.cut is None or axis.size == 1:
        _feed(hasher, part)
        return hasher.hexdigest()
    _feed_shards(hasher, part, layout, axis, who=who)
    return hasher.hexdigest() if axis.rank == 0 else None


def hash_copies(tensor: Tensor, layout: Layout) -> dict[str, str]:
    """SHA-256 of every leaf or unit of a tensor that several ranks may hold.

    Args:
        tensor: layout.local_shape.
        layout: how it lies on this rank.
    Returns:
        Name of the leaf or unit -> hash of this rank's copy; empty if no rank holds a copy of what
        another rank owns.
    Comm:
        none.
    """
    hashes = {}
    for name, places in layout.copies():
        hasher = hashlib.sha256()
        _feed(hasher, take(tensor.detach(), layout.dim or 0, places))
        hashes[name] = hasher.hexdigest()
    return hashes


def owned_part(tensor: Tensor, layout: Layout) -> Tensor:
    """The part of a rank's tensor that the rank owns: a view, or a copy of its ranges."""
    if layout.dim is None or not layout.other_places:
        return tensor
    return take(tensor, layout.dim, layout.owned_places)


def _feed_shards(hasher: "_Hash", part: Tensor, layout: Layout, axis: Axis, *, who: str) -> None:
    """Feed the full tensor to rank 0's hasher, block by block; the other ranks send."""
    dim = layout.dim or 0
    outer, inner = math.prod(layout.shape[:dim]), math.prod(layout.shape[dim + 1 :])
    owned = [layout.of(rank).owned_runs for rank in range(axis.size)]
    lengths = [sum(map(len, runs)) for runs in owned]
    table = part.reshape(outer, lengths[axis.rank], inner)
    # As many rows of the full tensor as fit into the largest share; below one row, windows of it.
    most, size = max(lengths), layout.shape[dim]
    rows = outer * most // max(1, size) if dim else 0
    width = size if rows else most
    windows = [range(start, min(start + width, size)) for start in range(0, size, max(1, width))]
    for start in range(0, outer, rows or 1):
        for window in windows:
            runs = [_within(each, window) for each in owned]
            mine = take(table[start : start + (rows or 1)], 1, _positions(owned[axis.rank], window))
            shapes = [(len(mine), sum(map(len, each)), inner) for each in runs]
            block = _gather(mine.reshape(-1), [math.prod(each) for each in shapes], axis, who=who)
            if block is not None:
                parts = block.split([math.prod(each) for each in shapes])
                pieces = [each.view(shape) for each, shape in zip(parts, shapes, strict=True)]
                _feed(hasher, join(pieces, 1, runs))


def _within(runs: Sequence[range], window: range) -> list[range]:
    """The parts of some ranges inside a window, counted from the start of the window."""
    cut = [range(max(run.start, window.start), min(run.stop, window.stop)) for run in runs]
    return [range(each.start - window.start, each.stop - window.start) for each in cut if each]


def _positions(runs: Sequence[range], window: range) -> list[range]:
    """Positions of the parts inside a window, counted along the ranges laid end to end."""
    before = sum(max(0, min(run.stop, window.start) - run.start) for run in runs)
    length = sum(map(len, _within(runs, window)))
    return [range(before, before + length)]


def _gather(flat: Tensor, sizes: list[int], axis: Axis, *, who: str) -> Tensor | None:
    flat = flat.contiguous()
    return comm.gather(flat, axis, sizes=sizes, dst=0, direction="prover", who=who)


def _feed(hasher: "_Hash", tensor: Tensor) -> None:
    """Feed a tensor's bytes in row-major order, by rows."""
    table = tensor.reshape(1, 1) if tensor.ndim == 0 else tensor
    if not table.numel():
        return
    row_bytes = table.numel() // len(table) * table.element_size()
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, len(table), rows):
        flat = table[start : start + rows].cpu().reshape(-1).contiguous()
        hasher.update(flat.view(torch.uint8).numpy().data)


def gather_whole(tensor: Tensor, layout: Layout, axis: Axis, *, who: str) -> Tensor | None:
    """Gather a small tensor to rank 0.

    Args:
        tensor: layout.local_shape, Shard(layout.dim) or Replicate.
        layout: how it lies on this rank.
        axis: whose ranks hold it; all of them call this.
        who: what it is, for messages.
    Returns:
        layout.shape on rank 0; None on the others if it is sharded.
    Comm:
        gathers to rank 0 in direction "prover" if it is sharded.
    """
    part = owned_part(tensor.detach(), layout)
    if layout.cut is None or layout.dim is None or axis.size == 1:
        return part.clone()
    layouts = [layout.of(rank) for rank in range(axis.size)]
    shapes = [each.owned_shape for each in layouts]
    sizes = [math.prod(shape) for shape in shapes]
    full = _gather(part.reshape(-1), sizes, axis, who=who)
    if full is None:
        return None
    pieces = [each.view(shape) for each, shape in zip(full.split(sizes), shapes, strict=True)]
    return join(pieces, layout.dim, [each.owned_runs for each in layouts])
