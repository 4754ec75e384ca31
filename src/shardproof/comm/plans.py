"""The plan of a collective: its call, the order of additions, and its bytes. Plans are cached.

All of it follows from shapes, cuts and names, so that every rank finds the same; no tensors.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shardproof.leaves import Cut, share
from shardproof.numerics.precision import node_dtype
from shardproof.observing import REPLICATE, Placement, shard
from shardproof.transport.base import Call, Order, Window, rank_order
from shardproof.tree import formula, nodes_of_run, steps

# A call, how many elements each rank has in a row, and how many rows.
GatherPlan = tuple[Call, tuple[int, ...], int]
_CACHE_SIZE = 4096  # of each kind are kept


class ShardOf(NamedTuple):
    """What a reduce-scatter gives to each rank: its part of a whole.

    Attributes:
        shape: of the whole sum.
        dim: along which the sum is cut, counted from either end.
        cut: of that dim.
    """

    shape: tuple[int, ...]
    dim: int
    cut: Cut


@dataclass(frozen=True)
class SumPlan:
    """One sum over the ranks, as far as shapes and cuts decide it.

    Attributes:
        call: what it is.
        order: in which the ranks' parts are added.
        shape: of what this rank gets.
        message_bytes, sent_bytes: for the ledger.
        cut: of the contracted dim, whose tree is the order; None: the transport's own order.
        rank: whose plan it is.
        windows: what each rank gets of the sum; None if all get all of it.
        placement: of the sum.
    """

    call: Call
    order: Order
    shape: tuple[int, ...]
    message_bytes: int
    sent_bytes: int
    cut: Cut | None = None
    rank: int = 0
    windows: tuple[Window, ...] | None = None
    placement: Placement = REPLICATE


@functools.lru_cache(_CACHE_SIZE)
def gather_plan(
    direction: str,
    who: str,
    before: tuple[int, ...],
    after: tuple[int, ...],
    dtype: torch.dtype,
    cut: Cut,
) -> GatherPlan:
    """An all-gather: its call, how many elements each rank has in a row, and how many rows.

    Args:
        direction: of the call.
        who: of the call.
        before: the sizes of the dims before the one that is cut.
        after: the sizes of the dims after it.
        dtype: of what travels.
        cut: of that dim.
    """
    shape = (*before, cut.size, *after)
    call = Call("all_gather", direction, who, shape, dtype, _describe(cut, len(before)))
    return call, tuple(length * _numel(after) for length in cut.sizes()), _numel(before)


@functools.lru_cache(_CACHE_SIZE)
def sizes_plan(
    direction: str,
    who: str,
    before: tuple[int, ...],
    after: tuple[int, ...],
    dtype: torch.dtype,
    sizes: tuple[int, ...],
) -> GatherPlan:
    """`gather_plan` where each rank's length along the dim is given.

    Args:
        direction: of the call.
        who: of the call.
        before: the sizes of the dims before the one that is cut.
        after: the sizes of the dims after it.
        dtype: of what travels.
        sizes: every rank's length along the dim.
    """
    shape = (*before, sum(sizes), *after)
    detail = f"{sum(sizes)} indices along dim {len(before)}, by rank {sizes}"
    call = Call("all_gather", direction, who, shape, dtype, detail)
    return call, tuple(length * _numel(after) for length in sizes), _numel(before)


@functools.lru_cache(_CACHE_SIZE)
def native_plan(
    direction: str, who: str, shape: tuple[int, ...], dtype: torch.dtype, size: int
) -> SumPlan:
    """An all-reduce of one partial per rank, in the transport's own order.

    Args:
        direction: of the call.
        who: of the call.
        shape: of the message.
        dtype: of the result.
        size: number of ranks.
    """
    call = Call("all_reduce", direction, who, shape, dtype)
    message = _numel(shape) * dtype.itemsize
    return SumPlan(call, rank_order(size), shape, message, 2 * (size - 1) * message // size)


@functools.lru_cache(_CACHE_SIZE)
def tree_plan(
    direction: str, who: str, shape: tuple[int, ...], dtype: torch.dtype, cut: Cut, rank: int
) -> SumPlan:
    """An all-reduce of canonical nodes, as `rank` sees it.

    A rank sends its nodes' slices to the ranks that finish them, and its finished slice to all.

    Args:
        direction: of the call.
        who: of the call.
        shape: of the message.
        dtype: of the result.
        cut: of the contracted dim.
        rank: whose bytes are counted.
    """
    call = Call("all_reduce", direction, who, shape, dtype, _describe(cut))
    order = tree_order(cut)
    lengths = [len(bound) for bound in share(_numel(shape), cut.degree)]
    elsewhere = sum(lengths) - lengths[rank]
    sent = order.counts[rank] * elsewhere * node_dtype(dtype).itemsize
    sent += (cut.degree - 1) * lengths[rank] * dtype.itemsize
    message = _numel(shape) * dtype.itemsize
    return SumPlan(call, order, shape, message, sent, cut, rank)


@functools.lru_cache(_CACHE_SIZE)
def scatter_plan(
    direction: str, who: str, into: ShardOf, dtype: torch.dtype, cut: Cut | None, rank: int
) -> SumPlan:
    """A reduce-scatter of canonical nodes or, without `cut`, of one partial per rank.

    A rank sends its nodes' windows to the ranks that own them.

    Args:
        direction: of the call.
        who: of the call.
        into: what each rank gets.
        dtype: of the result.
        cut: of the contracted dim, or None.
        rank: whose bytes and shape these are.
    """
    shape, dim, dim_cut = into.shape, into.dim % len(into.shape), into.cut
    detail = (
        _describe(dim_cut, dim) if cut is None else f"{_describe(cut)} to {_describe(dim_cut, dim)}"
    )
    call = Call("reduce_scatter", direction, who, shape, dtype, detail)
    order = rank_order(dim_cut.degree) if cut is None else tree_order(cut)
    outer, inner = _numel(shape[:dim]), _numel(shape[dim + 1 :])
    owned = [dim_cut.owned(each) for each in range(dim_cut.degree)]
    windows = tuple(Window(outer, shape[dim], inner, own.start, own.stop) for own in owned)
    mine = (*shape[:dim], len(owned[rank]), *shape[dim + 1 :])
    elsewhere = _numel(shape) - _numel(mine)
    sent_dtype = dtype if cut is None else node_dtype(dtype)
    sent = order.counts[rank] * elsewhere * sent_dtype.itemsize
    message = _numel(shape) * dtype.itemsize
    placement = shard(dim, owned[rank], dim_cut.size)
    return SumPlan(call, order, mine, message, sent, cut, rank, windows, placement)


@functools.cache
def tree_order(cut: Cut) -> Order:
    """The canonical tree over the ranks' nodes, which are numbered through in rank order."""
    nodes = [nodes_of_run(cut.num_leaves, cut.run(rank)) for rank in range(cut.degree)]
    numbers = {node: number for number, node in enumerate(itertools.chain(*nodes))}
    program = steps((0, cut.num_leaves), numbers)
    return Order(tuple(map(len, nodes)), tuple(program))


@functools.lru_cache(_CACHE_SIZE)
def written_sum(cut: Cut) -> str:
    """The additions of the ranks' nodes, as people read them."""
    nodes = {
        node for rank in range(cut.degree) for node in nodes_of_run(cut.num_leaves, cut.run(rank))
    }
    return formula((0, cut.num_leaves), nodes)


def _describe(cut: Cut, dim: int | None = None) -> str:
    along = "" if dim is None else f" along dim {dim}"
    return f"{cut.size} units in {cut.num_leaves} leaves{along}"


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
