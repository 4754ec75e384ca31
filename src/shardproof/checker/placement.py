"""How the tensors of the ranks lie in the whole one: alike, slices, parts of a sum, or none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

REPLICATE, SHARD, PARTIAL, NONE = "Replicate", "Shard", "Partial", "none"
# Two tensors of fp64 are alike if they are apart by no more than this part of the largest element.
ALIKE = 2.0**-30
_SEED = 5


@dataclass(frozen=True)
class FoundPlacement:
    """How the tensors of the ranks lie in the whole tensor.

    Attributes:
        kind: "Replicate", "Shard", "Partial" or "none". With "none" the rest says what is nearest.
        dim: of the whole tensor that is cut; None otherwise.
        indices: of each rank along `dim`; None unless the kind is "Shard".
        difference: largest, of elements, from what the kind says; inf where nothing fits.
        view: the whole tensor in the shape of the ranks' tensors, before it is cut.
        nearest: with "none", the kind that is nearest; empty where the shapes fit none.
    """

    kind: str
    difference: float
    view: Tensor
    dim: int | None = None
    indices: tuple[tuple[int, ...], ...] | None = None
    nearest: str = ""

    @property
    def is_in_order(self) -> bool:
        """Whether ranks hold consecutive slices, in the order of the ranks."""
        if self.indices is None:
            return True
        joined = [each for rank in self.indices for each in rank]
        return joined == list(range(len(joined)))

    @property
    def covers(self) -> bool:
        """Whether the ranks together hold every element."""
        if self.indices is None or self.dim is None:
            return True
        held = {each for rank in self.indices for each in rank}
        return held.issuperset(range(self.view.shape[self.dim]))

    def expected(self, rank: int) -> Tensor | None:
        """What a rank should hold; None where that is not determined."""
        kind = self.nearest or self.kind
        if kind == REPLICATE:
            return self.view
        if kind == SHARD and self.indices is not None and self.dim is not None:
            inside = [i for i in self.indices[rank] if i < self.view.shape[self.dim]]
            return self.view.index_select(self.dim, torch.tensor(inside, dtype=torch.long))
        return None

    def __str__(self) -> str:
        if self.kind != SHARD:
            return self.kind
        order = "" if self.is_in_order else ", not in the order of ranks"
        return f"Shard({self.dim}){order}"


def slice_for(rank: int, locals_: Sequence[Tensor], whole: Tensor) -> Tensor:
    """What a rank would hold if the whole was cut into consecutive slices of the ranks' sizes."""
    local = locals_[rank]
    if local.ndim != whole.ndim:
        return whole
    for dim in range(whole.ndim):
        if local.shape[dim] != whole.shape[dim]:
            start = sum(each.shape[dim] for each in locals_[:rank])
            size = min(local.shape[dim], max(whole.shape[dim] - start, 0))
            return whole.narrow(dim, start, size) if size else whole
    return whole


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference between elements of two tensors; inf for NaN or other shapes."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    difference = (a.double() - b.double()).abs().max().item()
    return math.inf if math.isnan(difference) else difference


def largest(x: Tensor) -> float:
    """The largest absolute element; 0 of an empty tensor, inf where one is NaN."""
    if not x.numel():
        return 0.0
    value = x.abs().max().item()
    return math.inf if math.isnan(value) else value


def place(locals_: Sequence[Tensor], whole: Tensor, bound: float) -> FoundPlacement:
    """How tensors of ranks lie in the whole one.

    Args:
        locals_: one of each rank.
        whole: of the reference.
        bound: largest difference between elements that are alike.

    Returns:
        The first kind that fits within `bound`, or "none" with the smallest difference.
    """
    nearest = FoundPlacement(NONE, math.inf, whole)
    for view in _views(locals_[0], whole):
        for found in (_replicate, _shard, _copies, _partial, _indexed):
            placement = found(locals_, view, bound)
            if placement is None:
                continue
            if placement.difference <= bound:
                return placement
            if placement.difference < nearest.difference:
                nearest = replace(placement, kind=NONE, nearest=placement.kind)
    return nearest


def difference_as(
    kind: FoundPlacement, locals_: Sequence[Tensor], whole: Tensor
) -> tuple[float, Tensor]:
    """How far other tensors are from what `kind` says, and their view of the whole."""
    for view in _views(locals_[0], whole):
        if view.shape == kind.view.shape:
            return _difference(replace(kind, view=view), locals_), view
    return math.inf, whole


def matched(local: Tensor, whole: Tensor, dim: int, bound: float) -> tuple[int, ...] | None:
    """Which slices of `whole` along `dim` the slices of `local` are; None if one is none of them.

    Equal slices of the whole are taken one after the other.
    """
    if local.ndim != whole.ndim or not whole.shape[dim]:
        return None
    rows = local.movedim(dim, 0).flatten(1) if local.ndim > 1 else local.unsqueeze(1)
    every = whole.movedim(dim, 0).flatten(1) if whole.ndim > 1 else whole.unsqueeze(1)
    if rows.shape[1] != every.shape[1] or not rows.shape[1]:
        return None
    if not torch.isfinite(rows).all() or not torch.isfinite(every).all():
        return None
    direction = torch.rand(
        rows.shape[1], generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64
    )
    keys, of_rows = every.double() @ direction, rows.double() @ direction
    # The sums of equal rows may be added in another order.
    width = bound * rows.shape[1] + 2.0**-20 * float(every.double().abs().max()) * rows.shape[1]
    order = torch.argsort(keys, stable=True)
    ordered = keys[order]
    first = torch.searchsorted(ordered, of_rows - width)
    end = torch.searchsorted(ordered, of_rows + width, right=True)
    used: set[int] = set()
    found: list[int] = []
    for row, (low, high) in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
        fitting = [i for i in order[low:high].tolist() if apart(rows[row], every[i]) <= bound]
        if not fitting:
            return None
        fresh = [each for each in sorted(fitting) if each not in used]
        # The one after the last is meant where several are alike.
        following = [each for each in fresh if found and each == found[-1] + 1]
        chosen = (following or fresh or sorted(fitting))[0]
        used.add(chosen)
        found.append(chosen)
    return tuple(found)


def _views(local: Tensor, whole: Tensor) -> list[Tensor]:
    """The whole tensor in shapes that the rank's may be a slice of, the likely one first."""
    views = [whole] if whole.ndim == local.ndim else []
    if whole.ndim == local.ndim + 1 and whole.ndim > 1:
        views.append(whole.flatten(0, 1))
        if whole.shape[0] == 1:
            views.append(whole[0])
    if local.ndim == whole.ndim + 1:
        for size in {local.shape[0], *([] if not whole.ndim else [1])}:
            if size and whole.ndim and whole.shape[0] % size == 0:
                views.append(whole.unflatten(0, (size, whole.shape[0] // size)))
    if whole.ndim == local.ndim >= 3:
        views.append(whole.transpose(0, 1).contiguous())
    if whole.ndim == local.ndim + 1 >= 3:
        views.append(whole.transpose(0, 1).flatten(0, 1))
    return views


def _replicate(locals_: Sequence[Tensor], view: Tensor, bound: float) -> FoundPlacement | None:
    if any(each.shape != view.shape for each in locals_):
        return None
    return FoundPlacement(REPLICATE, max(apart(each, view) for each in locals_), view)


def _shard(locals_: Sequence[Tensor], view: Tensor, bound: float) -> FoundPlacement | None:
    """Consecutive slices, in the order of the ranks; what is behind the end is padding."""
    best = None
    for dim in range(view.ndim):
        if not _fit_beside(locals_, view, dim):
            continue
        total = sum(each.shape[dim] for each in locals_)
        if total < view.shape[dim]:
            continue
        joined = torch.cat(list(locals_), dim).narrow(dim, 0, view.shape[dim])
        if total > view.shape[dim] and any(each.shape == view.shape for each in locals_):
            continue
        indices, start = [], 0
        for each in locals_:
            indices.append(tuple(range(start, start + each.shape[dim])))
            start += each.shape[dim]
        found = FoundPlacement(SHARD, apart(joined, view), view, dim, tuple(indices))
        if best is None or found.difference < best.difference:
            best = found
    return best


def _copies(locals_: Sequence[Tensor], view: Tensor, bound: float) -> FoundPlacement | None:
    """Consecutive slices, each on several ranks, as on a mesh of two dims."""
    for dim in range(view.ndim):
        if not _fit_beside(locals_, view, dim):
            continue
        indices = []
        for each in locals_:
            size = each.shape[dim]
            last = view.shape[dim] - size  # the last slice may have another size
            starts = [
                start
                for start in dict.fromkeys([*range(0, last + 1, max(size, 1)), last])
                if size and start >= 0 and apart(each, view.narrow(dim, start, size)) <= bound
            ]
            if not starts:
                break
            indices.append(tuple(range(starts[0], starts[0] + size)))
        if len(indices) == len(locals_):
            found = FoundPlacement(SHARD, 0.0, view, dim, tuple(indices))
            if found.covers:
                return _measured(found, locals_)
    return None


def _indexed(locals_: Sequence[Tensor], view: Tensor, bound: float) -> FoundPlacement | None:
    """Slices in any order, such as the query, key and value rows of a fused product."""
    for dim in range(view.ndim):
        if not _fit_beside(locals_, view, dim):
            continue
        if any(each.shape[dim] > view.shape[dim] for each in locals_):
            continue
        indices = [matched(each, view, dim, bound) for each in locals_]
        found = [each for each in indices if each is not None]
        is_whole = all(each.shape == view.shape for each in locals_)
        if len(found) == len(locals_) and not is_whole:
            placement = FoundPlacement(SHARD, 0.0, view, dim, tuple(found))
            if placement.covers:
                return _measured(placement, locals_)
    return None


def _partial(locals_: Sequence[Tensor], view: Tensor, bound: float) -> FoundPlacement | None:
    """Parts of a sum; on a mesh of two dims each part is on several ranks."""
    if any(each.shape != view.shape for each in locals_):
        return None
    parts: list[Tensor] = []
    for each in locals_:
        if not any(apart(each, part) <= bound for part in parts):
            parts.append(each)
    if len(parts) < 2:
        return None
    sums = [torch.stack(list(locals_)).sum(0)]
    if len(parts) < len(locals_):
        sums.append(torch.stack(parts).sum(0))
    return FoundPlacement(PARTIAL, min(apart(each, view) for each in sums), view)


def _fit_beside(locals_: Sequence[Tensor], view: Tensor, dim: int) -> bool:
    """Whether the ranks' tensors have the shape of slices of the whole one along `dim`."""
    return all(
        each.ndim == view.ndim
        and all(
            a == b for d, (a, b) in enumerate(zip(each.shape, view.shape, strict=True)) if d != dim
        )
        for each in locals_
    )


def _measured(placement: FoundPlacement, locals_: Sequence[Tensor]) -> FoundPlacement:
    return replace(placement, difference=_difference(placement, locals_))


def _difference(placement: FoundPlacement, locals_: Sequence[Tensor]) -> float:
    if PARTIAL in (placement.kind, placement.nearest):
        found = _partial(locals_, placement.view, 0.0)
        return math.inf if found is None else found.difference
    differences = [math.inf]
    for rank, each in enumerate(locals_):
        expected = placement.expected(rank)
        if expected is None:
            return math.inf
        if placement.dim is not None and each.ndim == expected.ndim:
            each = each.narrow(
                placement.dim, 0, min(each.shape[placement.dim], expected.shape[placement.dim])
            )
        differences.append(apart(each, expected))
    return max(differences[1:], default=math.inf)
