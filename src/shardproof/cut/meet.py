"""How tensors that are cut, or whole, come to lie alike for one operation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardproof.cut.others import keep_weight, whole
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor
from shardproof.ops import unit_ops
from shardproof.units import CutDim, Shared


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """`torch.broadcast_shapes`, of which torch's own takes 50 microseconds."""
    first = shapes[0]
    if all(shape == first for shape in shapes):
        return first
    sizes = [1] * max(map(len, shapes))
    for shape in shapes:
        for place, size in enumerate(shape, len(sizes) - len(shape)):
            if size != 1 and sizes[place] != size:
                if sizes[place] != 1:
                    return torch.broadcast_shapes(*shapes)  # raises
                sizes[place] = size
    return tuple(sizes)


def common(tensors: Sequence[Any], shape: tuple[int, ...]) -> tuple[Spec, str] | None:
    """How a result of that shape is cut, from operands that broadcast to it.

    Of cuts along one dim it is the finest; the first, if none is. None: they are cut along several
    dims.
    """
    cuts = [x for x in tensors if isinstance(x, CutTensor)]
    cuts = [x for x in cuts if not is_for_all(x)] or cuts
    dim = cuts[0].spec.dim + len(shape) - cuts[0].dim()
    for x in cuts:
        if x.spec.dim + len(shape) - x.dim() != dim or x.shape[x.spec.dim] != shape[dim]:
            return None
    finest = finest_of(cuts)
    return finest.spec.region.spec(shape, dim, finest.spec.cut), finest.who


def finest_of(cuts: Sequence[CutTensor]) -> CutTensor:
    """The one whose cut is the finest; the first, if none is."""
    finest = cuts[0]
    for x in cuts[1:]:
        one, other = finest.spec.cut, x.spec.cut
        if not is_finer(one, other, finest.spec) and is_finer(other, one, finest.spec):
            finest = x
    return finest


def is_for_all(x: CutTensor) -> bool:
    """Whether all of it is one shared unit that every unit needs: whole on every rank with work."""
    blocks, units = x.spec.cut.blocks, x.spec.cut.shared.units
    if not blocks or blocks[0].first < units.count or blocks[0].size != blocks[0].unit:
        return False
    first = blocks[0].first
    return len(units.needers[first - units.count]) == units.count and all(
        each.first == first and each.size == each.unit for each in blocks
    )


def freed(x: CutTensor) -> Tensor:
    """All of what is for all; on a rank without work zeros, which nothing of its own will use."""
    if x.local.shape == x.shape:
        return unit_ops.not_compared(x.local.view_as(x.local))
    return unit_ops.not_compared(x.local.new_zeros(x.shape) + x.local.sum())


def are_alike(one: CutDim, other: CutDim) -> bool:
    """Whether units of both are shared among the ranks alike, whatever they are called."""
    a, b = one.shared, other.shared
    return a is b or (a.leaves, a.degree, replace(a.units, name="")) == (
        b.leaves,
        b.degree,
        replace(b.units, name=""),
    )


def is_finer(one: CutDim, other: CutDim, spec: Spec) -> bool:
    """Whether at every degree a rank that holds an index of `one` holds it of `other` too.

    Both by the same units: other leaves would be other sums. It asks nothing of this degree: which
    operand gives the cut decides the leaves of later sums.
    """
    one, other = spec.region.one(one), spec.region.one(other)
    if one is other:
        return True
    recipes = spec.region.recipes
    key = ("finer", id(one), id(other))
    if key not in recipes:
        recipes[key] = one.size == other.size and are_alike(one, other) and _is_finer(one, other)
    found: bool = recipes[key]
    return found


def _is_finer(one: CutDim, other: CutDim) -> bool:
    pairs = np.unique(np.stack([one.labels, other.labels]), axis=1).T
    return all(_goes_with(int(own), int(theirs), one.shared) for own, theirs in pairs)


def _goes_with(unit: int, other: int, shared: Shared) -> bool:
    """Whether every rank that holds one unit holds another, at every degree."""
    units = shared.units
    needers = {unit} if unit < units.count else set(units.needers[unit - units.count])
    if other >= units.count:
        return unit == other or needers <= set(units.needers[other - units.count])
    return all(_is_beside(each, other, shared) for each in needers)


def _is_beside(one: int, other: int, shared: Shared) -> bool:
    """Whether two units have one owner at every degree: in one leaf, or between two breaks."""
    if shared.leaf_of[one] == shared.leaf_of[other]:
        return True
    breaks = shared.units.breaks
    low, high = sorted((one, other))
    return breaks is not None and not any(low < each <= high for each in breaks)


def fitted(x: Any, spec: Spec, who: str) -> Tensor:
    """This rank's part of an operand, as one of `spec` meets it; it may lack the cut dim."""
    place = spec.dim - (len(spec.shape) - x.dim())
    if isinstance(x, CutTensor):
        if x.spec.dim == place and x.shape[place] == spec.shape[spec.dim]:
            if is_finer(spec.cut, x.spec.cut, spec):
                return refined(x, spec.cut).local
            x = whole(x, "a tensor that is cut by other units")
        else:
            x = freed(x) if is_for_all(x) else whole(x, "a tensor that is cut along another dim")
    if place < 0 or x.shape[place] == 1 != spec.shape[spec.dim]:
        if x.requires_grad and torch.is_grad_enabled():
            where = spec.region.place(spec.cut, who)
            return unit_ops.spread(x, spec.local_shape, spec.dim, where)
        return x
    if x.shape[place] == spec.shape[spec.dim]:
        part = unit_ops.take if x.requires_grad else unit_ops.held_part
        return part(x, place, spec.region.place(spec.cut, who))
    return x


def refined(x: CutTensor, cut: CutDim) -> CutTensor:
    """The same tensor, held as another cut holds it: served if that is finer, else gathered."""
    spec, region = x.spec, x.spec.region
    cut = region.one(cut)
    if spec.cut is cut:
        return x
    key = ("refined", id(spec.cut), id(cut), x.who)
    if key not in region.recipes:
        own = CutDim(cut.shared, spec.cut.blocks) if are_alike(cut, spec.cut) else spec.cut
        places = region.place(own, x.who), region.place(cut, x.who)
        index = tuple(range(spec.shape[spec.dim])) if is_finer(cut, spec.cut, spec) else None
        region.recipes[key] = (*places, index)
    place, target, index = region.recipes[key]
    made = region.spec(spec.shape, spec.dim, cut)
    if place is target:
        return cut_tensor(x.local, made, x.who)
    if index is not None:
        part = unit_ops.serve(x.local, spec.dim, place, target, index)
    else:
        keep_weight(x, "cut in another way")
        region.count_gathered("cut in another way", x.who)
        part = unit_ops.take(unit_ops.gather(x.local, spec.dim, place), spec.dim, target)
    return cut_tensor(part, made, x.who)


def served(x: CutTensor, cut: CutDim, times: int) -> Tensor:
    """What a rank holds of a tensor each of whose indices along the cut dim serves several others.

    Args:
        x: cut by shared units, such as key-value heads.
        cut: of the others, such as query heads; `times` as many.
        times: how many stand side by side.
    """
    place, target, index, _ = _serving(x, cut, times)
    return unit_ops.serve(x.local, x.spec.dim, place, target, index)


def where_served(x: CutTensor, cut: CutDim, times: int) -> tuple[int, ...]:
    """For each index that the rank holds of `cut`, where `x` has the one that serves it.

    Args:
        x: as in `served`, like the others.
        cut: likewise.
        times: likewise.
    """
    found: tuple[int, ...] = _serving(x, cut, times)[3]
    return found


def _serving(x: CutTensor, cut: CutDim, times: int) -> Any:
    """Places of both, for each index of `cut` its source, and where this rank holds those."""
    region = x.spec.region
    cut = region.one(cut)
    key = ("served", id(x.spec.cut), id(cut), times, x.who)
    found = region.recipes.get(key)
    if found is None:
        index = tuple(place // times for place in range(cut.size))
        own = CutDim(cut.shared, x.spec.cut.blocks)  # the same units, maybe by another name
        place, target = region.place(own, x.who), region.place(cut, x.who)
        held = unit_ops.where_served(place, target, index)
        found = region.recipes[key] = place, target, index, held
    return found


def is_served(x: CutTensor, cut: CutDim, times: int) -> bool:
    """Whether `served` can be had: every rank holds what its indices of `cut` need."""
    region = x.spec.region
    cut = region.one(cut)
    key = ("is served", id(x.spec.cut), id(cut), times)
    if key not in region.recipes:
        labels = np.repeat(x.spec.cut.labels, times)
        repeated = CutDim.of_labels(x.spec.cut.shared, labels)
        region.recipes[key] = cut.size == len(labels) and is_finer(cut, repeated, x.spec)
    found: bool = region.recipes[key]
    return found


def one_along(x: CutTensor, dim: int) -> CutTensor:
    """A stand-in of size 1 along a dim that is not cut: what is asked is how the others are cut."""
    shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
    return CutTensor(x.local, x.spec.region.spec(shape, x.spec.dim, x.spec.cut), x.who)
