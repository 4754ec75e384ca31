"""SHA-256 of a full tensor's bytes in row-major order, however the tensor is cut.

A sharded tensor is gathered to rank 0 in blocks of rows, and no block is larger than a rank's
share: the full tensor is hashed without ever being in one place. The hash at any degree is the
one that `hashlib` gives for the bytes of the full tensor.
"""

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardproof import comm
from shardproof.axis import Axis
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


def hash_copies(tensor: Tensor, layout: Layout) -> dict[int, str]:
    """Leaf -> SHA-256 of what this rank holds of it, where a rank may hold what another one owns.

    Args:
        tensor: layout.local_shape.
        layout: how it lies on this rank.
    Returns:
        Empty where every rank holds what it owns.
    Comm:
        none.
    """
    if layout.cut is None or layout.cut.runs is None:
        return {}
    found = {}
    for leaf, where, _ in layout.held_leaves():
        hasher = hashlib.sha256()
        _feed(hasher, tensor.detach()[where])
        found[leaf] = hasher.hexdigest()
    return found


def owned_part(tensor: Tensor, layout: Layout) -> Tensor:
    """What a rank owns of what it holds, as a view."""
    if layout.cut is None or layout.dim is None or layout.held is None:
        return tensor
    held, owned = layout.held_indices, layout.owned
    if held == owned:
        return tensor
    if not owned:  # all that it holds is another rank's
        return tensor.narrow(layout.dim, 0, 0)
    return tensor.narrow(layout.dim, owned.start - held.start, len(owned))


def _feed_shards(hasher: "_Hash", part: Tensor, layout: Layout, axis: Axis, *, who: str) -> None:
    """Feed the full tensor on rank 0, block by block; the others send."""
    dim = layout.dim or 0
    outer, inner = math.prod(layout.shape[:dim]), math.prod(layout.shape[dim + 1 :])
    sizes = [len(layout.of(rank).owned) * inner for rank in range(axis.size)]
    table = part.reshape(outer, sizes[axis.rank])
    # As many rows of the full tensor as fit into the largest share; below one row, the ranks'
    # pieces of a row are sent in turn.
    rows = outer * max(sizes) // max(1, sum(sizes)) if dim else 0
    if rows:
        for start in range(0, outer, rows):
            _feed_rows(hasher, table[start : start + rows], sizes, axis, who=who)
        return
    for row in table:
        for rank in range(axis.size):
            if sizes[rank]:
                alone = [size if r == rank else 0 for r, size in enumerate(sizes)]
                mine = row if axis.rank == rank else row[:0]
                block = _gather(mine, alone, axis, who=who)
                if block is not None:
                    _feed(hasher, block)


def _feed_rows(hasher: "_Hash", rows: Tensor, sizes: list[int], axis: Axis, *, who: str) -> None:
    """Gather some rows of a table that is cut along dim 1, and feed them on rank 0."""
    lengths = [len(rows) * size for size in sizes]
    block = _gather(rows.reshape(-1), lengths, axis, who=who)
    if block is not None:
        pieces = block.split(lengths)
        whole = [piece.view(len(rows), size) for piece, size in zip(pieces, sizes, strict=True)]
        _feed(hasher, torch.cat(whole, dim=1))


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
