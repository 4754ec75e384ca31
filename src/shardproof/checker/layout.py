"""How each parameter lies on the ranks, found by looking: which slices of which whole parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.checker.placement import apart, matched
from shardproof.checker.step_recording import ParameterRecord, Recording


@dataclass(frozen=True)
class HeldPart:
    """What one rank holds of a whole parameter: the product of indices along each dim.

    Attributes:
        indices: along each dim of the whole parameter, in the order of the rank's own.
        is_transposed: whether the rank's parameter is the transpose of this.
    """

    indices: tuple[tuple[int, ...], ...]
    is_transposed: bool = False

    def take(self, whole: Tensor) -> Tensor:
        """What the rank would hold of another whole tensor, such as the gradient."""
        for dim, indices in enumerate(self.indices):
            if list(indices) != list(range(whole.shape[dim])):
                whole = whole.index_select(dim, torch.tensor(indices, dtype=torch.long))
        return whole.transpose(0, 1) if self.is_transposed else whole

    def add_to(self, whole: Tensor, local: Tensor) -> None:
        """Add what the rank holds to a whole tensor."""
        local = local.transpose(0, 1) if self.is_transposed else local
        at = torch.meshgrid(
            *[torch.tensor(each, dtype=torch.long) for each in self.indices], indexing="ij"
        )
        if whole.ndim:
            whole.index_put_(tuple(at), local, accumulate=True)
        else:
            whole += local


@dataclass(frozen=True)
class FoundLayout:
    """How a parameter lies on the ranks.

    Attributes:
        name: of the parameter in the program.
        whole: of the parameter in the reference that it is, or is a part of.
        shape: of the whole parameter.
        pieces: of each rank that has it; empty where nothing fits.
        declared: how it lies, as the program says.
        ranks: those that have it.
    """

    name: str
    whole: str
    shape: tuple[int, ...]
    pieces: tuple[HeldPart, ...]
    declared: str = ""
    ranks: tuple[int, ...] = ()

    @property
    def is_found(self) -> bool:
        """Whether it was found where each rank's part lies."""
        return bool(self.pieces)

    @property
    def cut_dims(self) -> tuple[int, ...]:
        """The dims along which a rank holds only a part."""
        return tuple(
            dim
            for dim, size in enumerate(self.shape)
            if any(sorted(piece.indices[dim]) != list(range(size)) for piece in self.pieces)
        )

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of it, in order."""
        return self.is_found and all(
            list(piece.indices[dim]) == list(range(size))
            for piece in self.pieces
            for dim, size in enumerate(self.shape)
        )

    @property
    def covers(self) -> bool:
        """Whether the ranks together hold every element."""
        count = torch.zeros(self.shape)
        for piece in self.pieces:
            piece.add_to(count, torch.ones_like(piece.take(count)))
        return bool((count > 0).all())

    @property
    def overlaps(self) -> bool:
        """Whether several ranks hold an element, and none holds all."""
        count = torch.zeros(self.shape)
        for piece in self.pieces:
            piece.add_to(count, torch.ones_like(piece.take(count)))
        return not self.is_whole and bool((count > 1).any())

    def __str__(self) -> str:
        if not self.is_found:
            return "not found"
        if self.is_whole:
            return "Replicate"
        dims = self.cut_dims
        if not dims:
            return "Replicate, in another order"
        transposed = ", transposed" if self.pieces[0].is_transposed else ""
        return ", ".join(f"Shard({dim})" for dim in dims) + transposed

    def held(self, rank: int) -> str:
        """The indices that a rank holds along the dims that are cut.

        >>> parts = HeldPart(((0, 1),)), HeldPart(((2, 3),))
        >>> FoundLayout("w", "w", (4,), parts, ranks=(0, 1)).held(1)
        '2:4'
        """
        if rank not in self.ranks:
            return "none"
        if not self.is_found:
            return "?"
        piece = self.pieces[self.ranks.index(rank)]
        return " x ".join(_runs(piece.indices[dim]) for dim in self.cut_dims) or "all"


def find_layouts(
    ranks: Sequence[Recording], reference: Recording, given: Mapping[str, str] | None = None
) -> dict[str, FoundLayout]:
    """How each parameter of the program lies, by its name.

    Args:
        ranks: the recordings of the ranks.
        reference: the recording of the plain module.
        given: the names of whole parameters, where the program calls them otherwise.
    """
    named = given or {}
    wholes = {name: each.value for name, each in reference.parameters.items()}
    free = {name for name in wholes if all(name not in each.parameters for each in ranks)}
    found: dict[str, FoundLayout] = {}
    # Values that are alike fit in several ways. They are looked at after those that do not.
    waiting = []
    names = dict.fromkeys(name for each in ranks for name in each.parameters)
    holders = {n: tuple(r for r, each in enumerate(ranks) if n in each.parameters) for n in names}
    for name in names:
        records = [ranks[rank].parameters[name] for rank in holders[name]]
        candidates = [named.get(name, name)] if named.get(name, name) in wholes else sorted(free)
        layout = None
        for whole in candidates:
            if _are_constant(records, wholes[whole]):
                waiting.append((name, whole, records))
                break
            pieces = _pieces(records, wholes[whole])
            if pieces or whole == name:
                layout = FoundLayout(
                    name,
                    whole,
                    tuple(wholes[whole].shape),
                    pieces or (),
                    records[0].declared,
                    holders[name],
                )
                if pieces:
                    free.discard(whole)
                    break
        if layout is not None:
            found[name] = layout
    for name, whole, records in waiting:
        alike = _like_sibling(name, records, wholes[whole], found)
        found[name] = FoundLayout(
            name, whole, tuple(wholes[whole].shape), alike, records[0].declared, holders[name]
        )
    return found


def _are_constant(records: Sequence[ParameterRecord], whole: Tensor) -> bool:
    """Whether all elements are equal, so that values do not say where a part lies."""
    is_cut = any(each.value.shape != whole.shape for each in records)
    return is_cut and whole.numel() > 1 and _is_constant(whole)


def _pieces(records: Sequence[ParameterRecord], whole: Tensor) -> tuple[HeldPart, ...] | None:
    """Where the part of each rank lies; None if it is not in the whole."""
    full = HeldPart(tuple(tuple(range(size)) for size in whole.shape))
    if all(each.value.shape == whole.shape and apart(each.value, whole) == 0.0 for each in records):
        return (full,) * len(records)
    pieces = []
    for each in records:
        piece = _piece(each, whole, full)
        if piece is None:
            return None
        pieces.append(piece)
    return tuple(pieces)


def _piece(record: ParameterRecord, whole: Tensor, full: HeldPart) -> HeldPart | None:
    local = record.value
    for is_transposed in (False, True):
        if is_transposed and (local.ndim != 2 or whole.ndim != 2):
            break
        part = local.transpose(0, 1) if is_transposed else local
        if part.ndim != whole.ndim:
            continue
        if part.shape == whole.shape and apart(part, whole) == 0.0:
            return HeldPart(full.indices, is_transposed)
        hint = _at_offsets(record, part, whole)
        if hint is not None:
            return hint
        cut = [dim for dim in range(whole.ndim) if part.shape[dim] != whole.shape[dim]]
        for dim in cut or range(whole.ndim):
            if len(cut) > 1 or part.shape[dim] > whole.shape[dim]:
                continue
            indices = matched(part, whole, dim, 0.0)
            if indices is not None:
                return HeldPart(_with(full.indices, dim, indices), is_transposed)
        if len(cut) > 1:
            block = _block(part, whole)
            if block is not None:
                return HeldPart(block, is_transposed)
    return None


def _with(
    indices: tuple[tuple[int, ...], ...], dim: int, along: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    return (*indices[:dim], along, *indices[dim + 1 :])


def _at_offsets(record: ParameterRecord, part: Tensor, whole: Tensor) -> HeldPart | None:
    """The block at the offsets that a DTensor declares, if it is really there."""
    if record.offsets is None or len(record.offsets) != whole.ndim:
        return None
    block = whole
    for dim, (offset, size) in enumerate(zip(record.offsets, part.shape, strict=True)):
        if offset + size > whole.shape[dim]:
            return None
        block = block.narrow(dim, offset, size)
    if apart(block, part) != 0.0:
        return None
    return HeldPart(
        tuple(
            tuple(range(offset, offset + size))
            for offset, size in zip(record.offsets, part.shape, strict=True)
        )
    )


def _block(part: Tensor, whole: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """A block that is cut along several dims: where its first element lies."""
    if not part.numel() or any(a > b for a, b in zip(part.shape, whole.shape, strict=True)):
        return None
    for start in (whole == part.flatten()[0]).nonzero().tolist():
        if any(s + n > m for s, n, m in zip(start, part.shape, whole.shape, strict=True)):
            continue
        block = whole
        for dim, (offset, size) in enumerate(zip(start, part.shape, strict=True)):
            block = block.narrow(dim, offset, size)
        if apart(block, part) == 0.0:
            return tuple(tuple(range(s, s + n)) for s, n in zip(start, part.shape, strict=True))
    return None


def _is_constant(x: Tensor) -> bool:
    return not x.numel() or bool((x == x.flatten()[0]).all())


def _like_sibling(
    name: str,
    records: Sequence[ParameterRecord],
    whole: Tensor,
    found: Mapping[str, FoundLayout],
) -> tuple[HeldPart, ...]:
    """Where a parameter of equal elements lies: as another of its module, or in order."""
    module = name.rpartition(".")[0]
    sizes = [tuple(each.value.shape) for each in records]
    if whole.ndim != 1 or any(len(size) != 1 for size in sizes):
        return _in_order(records, whole)
    for other in found.values():
        if other.name.rpartition(".")[0] != module or not other.is_found:
            continue
        along = [piece.indices[0] for piece in other.pieces]
        if other.shape[0] == len(whole) and [len(each) for each in along] == [s[0] for s in sizes]:
            return tuple(HeldPart((each,)) for each in along)
    return _in_order(records, whole)


def _in_order(records: Sequence[ParameterRecord], whole: Tensor) -> tuple[HeldPart, ...]:
    for dim in range(whole.ndim):
        sizes = [each.value.shape[dim] for each in records if each.value.ndim == whole.ndim]
        if len(sizes) == len(records) and sum(sizes) == whole.shape[dim]:
            full = tuple(tuple(range(size)) for size in whole.shape)
            starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
            return tuple(
                HeldPart(_with(full, dim, tuple(range(start, start + size))))
                for start, size in zip(starts, sizes, strict=True)
            )
    return ()


def _runs(indices: Sequence[int]) -> str:
    """Indices as slices of consecutive ones.

    >>> _runs((0, 1, 4, 5))
    '0:2, 4:6'
    """
    slices: list[list[int]] = []
    for each in indices:
        if slices and slices[-1][1] == each:
            slices[-1][1] = each + 1
        else:
            slices.append([each, each + 1])
    words = [f"{start}:{stop}" for start, stop in slices]
    return ", ".join(words[:3] + ([f"and {len(words) - 3} more"] if len(words) > 3 else []))
