"""Bring operands, cut or whole, to one common cut before an operation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardproof.cut.fallback import keep_weight, whole
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor
from shardproof.ops import unit_ops
from shardproof.units import CutDim, Shared


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """`torch.broadcast_shapes`; torch's own takes 50 microseconds."""
    first = shapes[0]
    if all(shape == first for shape in shapes):
        return first
    sizes = [1] * max(map(len, shapes))
    for shape in shapes:
        for place, size in enumerate(shape, len(sizes) - len(shape)):
            if size != 1 and sizes[place] != size:
                if sizes[place] != 1:
                    return torch.broadcast_shapes(*shapes)  # raises the error
                sizes[place] = size
    return tuple(sizes)


def common(tensors: Sequence[Any], shape: tuple[int, ...]) -> tuple[Spec, str] | None:
    """How a result of that shape is cut, given operands that broadcast to it.

    The result has the finest of the operands' cuts, or the first if none is finer than all others.
    It is None if the operands are cut along different dims.
    """
    cuts = [x for x in tensors if isinstance(x, CutTensor)]
    cuts = [x for x in cuts if not is_one_shared_unit(x)] or cuts
    dim = cuts[0].spec.dim + len(shape) - cuts[0].dim()
    for x in cuts:
        if x.spec.dim + len(shape) - x.dim() != dim or x.shape[x.spec.dim] != shape[dim]:
            return None
    finest = finest_of(cuts)
    return finest.spec.region.spec(shape, dim, finest.spec.cut), finest.who


def finest_of(cuts: Sequence[CutTensor]) -> CutTensor:
    """The tensor with the finest cut, or the first if none is finer than all others."""
    finest = cuts[0]
    for x in cuts[1:]:
        one, other = finest.spec.cut, x.spec.cut
        if not is_finer(one, other, finest.spec) and is_finer(other, one, finest.spec):
            finest = x
    return finest


def is_one_shared_unit(x: CutTensor) -> bool:
    """Whether a tensor is one shared unit that every unit needs, so that ranks hold all of it."""
    blocks, units = x.spec.cut.blocks, x.spec.cut.shared.units
    if not blocks or blocks[0].first < units.count or blocks[0].size != blocks[0].unit:
        return False
    first = blocks[0].first
    return len(units.needers[first - units.count]) == units.count and all(
        each.first == first and each.size == each.unit for each in blocks
    )


def whole_or_zeros(x: CutTensor) -> Tensor:
    """The whole of a tensor that is one shared unit; zeros on a rank that owns no unit."""
    if x.local.shape == x.shape:
        return unit_ops.not_compared(x.local.view_as(x.local))
    return unit_ops.not_compared(x.local.new_zeros(x.shape) + x.local.sum())


def are_alike(one: CutDim, other: CutDim) -> bool:
    """Whether two cuts share equal units among the ranks; the units' names may differ."""
    a, b = one.shared, other.shared
    return a is b or (a.leaves, a.degree, replace(a.units, name="")) == (
        b.leaves,
        b.degree,
        replace(b.units, name=""),
    )


def is_finer(one: CutDim, other: CutDim, spec: Spec) -> bool:
    """Whether a rank that holds an index of `one` also holds it of `other`, at every degree.

    Both must be cut by the same units, because other leaves would change sums. The answer may not
    depend on this degree, because the chosen cut decides the leaves of later sums.
    """
    one, other = spec.region.one(one), spec.region.one(other)
    if one is other:
        return True
    recipes = spec.region.recipes
    key = ("finer", id(one), id(other))
    if key not in recipes:
        recipes[key] = one.size == other.size and are_alike(one, other) and _is_finer(one, other)
    result: bool = recipes[key]
    return result


def _is_finer(one: CutDim, other: CutDim) -> bool:
    pairs = np.unique(np.stack([one.labels, other.labels]), axis=1).T
    return all(_goes_with(int(own), int(theirs), one.shared) for own, theirs in pairs)


def _goes_with(unit: int, other: int, shared: Shared) -> bool:
    """Whether every rank that holds `unit` holds `other` too, at every degree."""
    units = shared.units
    needers = {unit} if unit < units.count else set(units.needers[unit - units.count])
    if other >= units.count:
        return unit == other or needers <= set(units.needers[other - units.count])
    return all(_is_beside(each, other, shared) for each in needers)


def _is_beside(one: int, other: int, shared: Shared) -> bool:
    """Whether two units have the same owner at every degree: one leaf, or no break between."""
    if shared.leaf_of[one] == shared.leaf_of[other]:
        return True
    breaks = shared.units.breaks
    low, high = sorted((one, other))
    return breaks is not None and not any(low < each <= high for each in breaks)


def fitted(x: Any, spec: Spec, who: str) -> Tensor:
    """This rank's part of an operand, cut as `spec` is; the operand may lack the cut dim."""
    place = spec.dim - (len(spec.shape) - x.dim())
    if isinstance(x, CutTensor):
        if x.spec.dim == place and x.shape[place] == spec.shape[spec.dim]:
            if is_finer(spec.cut, x.spec.cut, spec):
                return refined(x, spec.cut).local
            x = whole(x, "a tensor that is cut by other units")
        else:
            x = (
                whole_or_zeros(x)
                if is_one_shared_unit(x)
                else whole(x, "a tensor that is cut along another dim")
            )
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
    """The same tensor under another cut: taken from the part if that is finer, else gathered."""
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
    refined_spec = region.spec(spec.shape, spec.dim, cut)
    if place is target:
        return cut_tensor(x.local, refined_spec, x.who)
    if index is not None:
        part = unit_ops.serve(x.local, spec.dim, place, target, index)
    else:
        keep_weight(x, "cut in another way")
        region.count_gathered("cut in another way", x.who)
        part = unit_ops.take(unit_ops.gather(x.local, spec.dim, place), spec.dim, target)
    return cut_tensor(part, refined_spec, x.who)


def served(x: CutTensor, cut: CutDim, times: int) -> Tensor:
    """Repeat a tensor along its cut dim, as key-value heads for the query heads that use them.

    Args:
        x: cut by shared units, such as key-value heads.
        cut: the cut of the result, such as that of query heads, `times` as many.
        times: how many neighbouring indices of the result use one index of `x`.
    """
    place, target, index, _ = _serving(x, cut, times)
    return unit_ops.serve(x.local, x.spec.dim, place, target, index)


def where_served(x: CutTensor, cut: CutDim, times: int) -> tuple[int, ...]:
    """For each index of `cut` that this rank holds, the position in `x` of the index it uses.

    Args:
        x: as in `served`.
        cut: as in `served`.
        times: as in `served`.
    """
    places: tuple[int, ...] = _serving(x, cut, times)[3]
    return places


def _serving(x: CutTensor, cut: CutDim, times: int) -> Any:
    """Held positions of both cuts, the source index of each index, and its held position."""
    region = x.spec.region
    cut = region.one(cut)
    key = ("served", id(x.spec.cut), id(cut), times, x.who)
    recipe = region.recipes.get(key)
    if recipe is None:
        index = tuple(place // times for place in range(cut.size))
        own = CutDim(cut.shared, x.spec.cut.blocks)  # equal units; their names may differ
        place, target = region.place(own, x.who), region.place(cut, x.who)
        positions = unit_ops.where_served(place, target, index)
        recipe = region.recipes[key] = place, target, index, positions
    return recipe


def is_served(x: CutTensor, cut: CutDim, times: int) -> bool:
    """Whether `served` is possible: every rank holds the indices of `x` that it uses."""
    region = x.spec.region
    cut = region.one(cut)
    key = ("is served", id(x.spec.cut), id(cut), times)
    if key not in region.recipes:
        labels = np.repeat(x.spec.cut.labels, times)
        repeated = CutDim.of_labels(x.spec.cut.shared, labels)
        region.recipes[key] = cut.size == len(labels) and is_finer(cut, repeated, x.spec)
    result: bool = region.recipes[key]
    return result


def one_along(x: CutTensor, dim: int) -> CutTensor:
    """A placeholder of `x` with size 1 along a dim that is not cut, to find a common cut."""
    shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
    return CutTensor(x.local, x.spec.region.spec(shape, x.spec.dim, x.spec.cut), x.who)
