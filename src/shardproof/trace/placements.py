"""How tensors lie on the ranks, carried through operations of torch that do not change it.

What the package tells is known. The result of an operation of torch on Replicate tensors is
Replicate, unless a number among its arguments could differ between ranks. An element-wise operation
keeps the cut of its inputs; so does a view in which the cut dim can still be found. All other
results have no placement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shardproof.observing import REPLICATE, Placement, has_memory, shard, storage_of

Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]

_MANY = 4096  # entries, from which on those of freed memory are removed
_aten = torch.ops.aten
_VIEWS = {
    _aten._unsafe_view,
    _aten.reshape,
    _aten.resize_,  # of ours alone, to as many elements
    _aten.squeeze,
    _aten.unsqueeze,
    _aten.view,
}
_COPIES = {_aten.alias, _aten.clone, _aten.detach, _aten.lift_fresh, _aten._to_copy}
# They take a part of a tensor. A cut dim that keeps its length was not cut again.
_PARTS = {
    _aten.split,
    _aten.split_with_sizes,
    _aten.slice,
    _aten.narrow,
    _aten.select,
    _aten.index,
    _aten.index_select,
    _aten.unbind,
}
# Their numbers name dims, the same on every rank of one program, or are constants of a formula.
_OVER_DIMS = {
    _aten._log_softmax,
    _aten._softmax,
    _aten.amax,
    _aten.amin,
    _aten.argmax,
    _aten.cat,
    _aten.cumsum,
    _aten.logsumexp,
    _aten.max,
    _aten.mean,
    _aten.min,
    _aten.native_layer_norm,
    _aten.pow,
    _aten.stack,
    _aten.sum,
}
_PERMUTED = {_aten.t, _aten.transpose, _aten.permute}
_ELEMENTS_KEPT = _VIEWS | _COPIES | _PERMUTED
_DRAWN = torch.Tag.nondeterministic_seeded


@dataclass(frozen=True)
class TensorBefore:
    """A tensor before an operation, which may write into it or resize it.

    Attributes:
        shape: its shape.
        stride: its strides.
        place: how it lies, or None.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    place: Placement | None


class TensorPlacements:
    """The placement of each living tensor, by its memory."""

    def __init__(self) -> None:
        self._placements: dict[Key, tuple[StorageWeakRef, Placement]] = {}

    def learn(self, x: Tensor, placement: Placement | None) -> None:
        """Remember the placement of a tensor; None forgets it."""
        if not has_memory(x):
            return
        key = _key(x)
        if placement is None:
            self._placements.pop(key, None)
            return
        if len(self._placements) >= _MANY:
            self._forget()
        self._placements[key] = StorageWeakRef(x.untyped_storage()), placement

    def of(self, x: Tensor) -> Placement | None:
        """The placement of a tensor, or None."""
        entry = self._placements.get(_key(x)) if has_memory(x) else None
        if entry is None or entry[0].expired():
            return None
        return entry[1]

    def look(self, tensors: Sequence[Tensor]) -> list[TensorBefore]:
        """Shapes and placements of the operands, before the operation."""
        return [TensorBefore(tuple(x.shape), tuple(x.stride()), self.of(x)) for x in tensors]

    def carry(
        self,
        func: Any,
        operands: Sequence[TensorBefore],
        args: Any,
        results: Sequence[Tensor],
        *,
        is_ours: bool,
    ) -> None:
        """Learn the placements of what an operation of torch made.

        Args:
            func: the operation.
            operands: the tensors among its arguments, as they were before.
            args: all of its arguments.
            results: its results.
            is_ours: the package called it, and may have taken the part of this rank: then only
                views and copies of the same elements are known.
        """
        if is_ours and func.overloadpacket not in _ELEMENTS_KEPT:
            for y in results:
                self.learn(y, None)
            return
        layout_operations = _ELEMENTS_KEPT | _OVER_DIMS
        may_differ = func.overloadpacket not in layout_operations and _has_number(args)
        for y in results:
            self.learn(y, _after(func, operands, y, may_differ))

    def _forget(self) -> None:
        expired_keys = [key for key, (memory, _) in self._placements.items() if memory.expired()]
        for key in expired_keys:
            del self._placements[key]


def _has_number(args: Any) -> bool:
    """Whether a number of Python is among the arguments: it could be the number of the rank."""
    if isinstance(args, dict):
        args = list(args.values())
    if isinstance(args, list | tuple):
        return any(map(_has_number, args))
    return isinstance(args, int | float | complex) and not isinstance(args, bool)


def _after(
    func: Any, operands: Sequence[TensorBefore], y: Tensor, may_differ: bool
) -> Placement | None:
    if not operands or any(x.place is None for x in operands):
        return None
    cut = [x for x in operands if x.place != REPLICATE]
    if not cut:
        return None if may_differ or _DRAWN in func.tags else REPLICATE
    place = cut[0].place
    if place is None or place.kind != "Shard" or any(other.place != place for other in cut):
        return None
    return _moved(func, cut[0], place, y)


def _moved(func: Any, x: TensorBefore, place: Placement, y: Tensor) -> Placement | None:
    """The placement of `y`, which has the cut dim of `x`."""
    packet = func.overloadpacket
    if torch.Tag.pointwise in func.tags or packet in _COPIES or packet in _PARTS:
        is_kept = y.dim() == len(x.shape) and y.shape[place.dim] == x.shape[place.dim]
        return place if is_kept else None
    if packet in _PERMUTED:
        return _permuted(x, y, place)
    return _reshaped(x, y, place) if packet in _VIEWS else None


def _permuted(x: TensorBefore, y: Tensor, place: Placement) -> Placement | None:
    """Find the cut dim by its stride and size; None if two dims have the same."""
    stride, size = x.stride[place.dim], x.shape[place.dim]
    dims = [dim for dim in range(y.dim()) if (y.stride(dim), y.shape[dim]) == (stride, size)]
    return shard(dims[0], place.held, place.size) if len(dims) == 1 else None


def _reshaped(x: TensorBefore, y: Tensor, place: Placement) -> Placement | None:
    """Find the dim that has as many elements before it as the cut dim had."""
    if not y.numel():
        return None
    before, size = math.prod(x.shape[: place.dim]), x.shape[place.dim]
    starts = [dim for dim in range(y.dim()) if math.prod(y.shape[:dim]) == before]
    dim = next((dim for dim in starts if y.shape[dim] != 1), starts[0] if starts else None)
    if dim is None:
        return None
    length = y.shape[dim]
    if length == size:
        return shard(dim, place.held, place.size)
    if length and size % length == 0:  # into units, of which none is cut
        return _scaled(place, dim, 1, size // length)
    return _scaled(place, dim, length // size, 1) if length % size == 0 else None


def _scaled(place: Placement, dim: int, times: int, over: int) -> Placement:
    held, size = place.held, place.size
    if held is None or size is None:
        return shard(dim)
    if held.start % over or held.stop % over or size % over:
        return shard(dim)
    scaled = range(held.start * times // over, held.stop * times // over)
    return shard(dim, scaled, size * times // over)


def _key(x: Tensor) -> Key:
    return storage_of(x), int(x.storage_offset()), tuple(x.shape), tuple(x.stride())
