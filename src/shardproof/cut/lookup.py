"""Rows by number: embeddings, indexing, gathers and scatters; and losses over a cut vocabulary."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof import operators
from shardproof.cut.adopted import adopt
from shardproof.cut.meet import common, fitted, one_along
from shardproof.cut.others import gathered, invariant, whole
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import RULES, CutTensor, cut_tensor, named, rule, run
from shardproof.ops import unit_ops


@rule("embedding")
def embedding(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.embedding` of a weight that is cut by rows or by columns."""
    ids, weight, padding, most = named(args, kwargs, "input", "weight", "padding_idx", "max_norm")
    by_count = args[5] if len(args) > 5 else kwargs.get("scale_grad_by_freq", False)
    if isinstance(ids, CutTensor) or not isinstance(weight, CutTensor) or most is not None:
        return gathered(func, name, args, kwargs)
    spec = weight.spec
    place = spec.region.place(spec.cut, weight.who)
    options = {"padding_idx": padding, "scale_grad_by_freq": bool(by_count)}
    if spec.dim == 0:
        return unit_ops.lookup_rows(weight.local, ids, place, **options)
    y = unit_ops.lookup_columns(weight.local, ids, place, **options)
    shape = (*ids.shape, weight.shape[1])
    return cut_tensor(y, spec.region.spec(shape, len(shape) - 1, spec.cut), weight.who)


@rule("getitem")
def getitem(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Slices move data; tensors of numbers pick along whole dims."""
    x, index = args
    if not isinstance(x, CutTensor):
        return gathered(func, name, args, kwargs)
    given = index if isinstance(index, tuple) else (index,)
    if _WITHOUT_NUMBERS.issuperset(map(type, given)):
        return RULES["view"](func, name, (x, given), {})
    entries = list(given)
    entries = [whole(each, "index") if isinstance(each, CutTensor) else each for each in entries]
    if sum(isinstance(each, Tensor | list) for each in entries) == 1:
        entries = [_as_slice(each) if isinstance(each, list) else each for each in entries]
    if not any(isinstance(each, Tensor | list) for each in entries):
        return RULES["view"](func, "getitem", (x, tuple(entries)), {})
    return _picked(func, x, entries)


_WITHOUT_NUMBERS = frozenset((int, slice, type(None), type(Ellipsis)))


def _as_slice(numbers: list[Any]) -> Any:
    """A list of one number is a slice: the dim stays."""
    if len(numbers) != 1 or not isinstance(numbers[0], int) or isinstance(numbers[0], bool):
        return numbers
    return slice(numbers[0], numbers[0] + 1 or None)


def _picked(func: Any, x: CutTensor, entries: list[Any]) -> Any:
    """Advanced indexing: the cut dim stays cut if it is taken whole, else rows are looked up."""
    dim = _dim_left(x.shape, x.spec.dim, entries)
    if dim is None:
        rows = _rows_picked(x, entries)
        return gathered(func, "getitem", (x, tuple(entries)), {}) if rows is None else rows
    y = x.local[tuple(entries)]
    return cut_tensor(y, x.spec.of_part(y.shape, dim), x.who)


def _rows_picked(x: CutTensor, entries: list[Any]) -> Any:
    """Numbers of the cut dim alone, from a tensor: the ranks give what they hold."""
    index = entries[x.spec.dim] if len(entries) > x.spec.dim and Ellipsis not in entries else None
    others = [each for place, each in enumerate(entries) if place != x.spec.dim]
    if not isinstance(index, Tensor) or index.dtype not in _INTEGERS or not index.dim():
        return None
    if any(not isinstance(each, slice) or each != slice(None) for each in others):
        return None
    return looked_up(x, x.spec.dim, index)


_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


def looked_up(x: CutTensor, dim: int, index: Tensor) -> Tensor:
    """`x[:, index]` whose dim `dim` is the cut one: a lookup of rows, whole on every rank.

    Args:
        x: (*, size, *), Shard(dim).
        dim: that is indexed.
        index: (*ids,) numbers of rows.
    Returns:
        (*, *ids, *), Replicate.
    Comm:
        forward one all_reduce of the result; backward none.
    """
    rows = x.local.movedim(dim, 0)
    rest = tuple(rows.shape[1:])
    place = x.spec.region.place(x.spec.cut, x.who)
    index = torch.where(index < 0, index + x.shape[dim], index)
    flat = rows.reshape(rows.shape[0], math.prod(rest))
    y = unit_ops.lookup_rows(flat, index, place).reshape(*index.shape, *rest)
    n = index.dim()
    return y.movedim(tuple(range(n)), tuple(range(dim, dim + n)))


def _varies(numbers: Tensor, dim: int) -> bool:
    return numbers.shape[dim] > 1 and bool((numbers.narrow(dim, 0, 1) != numbers).any())


def _dim_left(shape: Sequence[int], dim: int, entries: list[Any]) -> int | None:
    """Where a dim is in `x[entries]`; None if the index does not take all of it."""
    at = _source_dims(len(shape), dim, entries)
    if at is None or any(
        source == dim and not (isinstance(each, slice) and _is_all(each, shape[dim]))
        for source, each in zip(at, entries, strict=True)
    ):
        return None
    with operators.unrecorded():
        return _dim_of(shape, dim, at, entries)


def _dim_of(
    shape: Sequence[int], dim: int, at: Sequence[int | None], entries: list[Any]
) -> int | None:
    """Where a dim of which all is taken is in `x[entries]`."""
    small = [*shape[:dim], 3, *shape[dim + 1 :]]
    whole_ = [
        slice(None) if source == dim else _stand_in(each)
        for source, each in zip(at, entries, strict=True)
    ]
    numbers = torch.arange(3, device="cpu").reshape(
        [-1 if d == dim else 1 for d in range(len(shape))]
    )
    picked = numbers.expand(small)[tuple(whole_)]
    if not picked.numel():
        return None
    return next((d for d in range(picked.dim()) if _varies(picked, d)), None)


def _stand_in(index: Any) -> Any:
    """An index of the same shape on the CPU: where dims go does not depend on its numbers."""
    if not isinstance(index, Tensor):
        return index
    return (
        torch.ones(index.shape, dtype=torch.bool, device="cpu")
        if index.dtype == torch.bool
        else (torch.zeros(index.shape, dtype=torch.int64, device="cpu"))
    )


def _is_all(each: slice, size: int) -> bool:
    return each.indices(size) == (0, size, 1)


def _source_dims(count: int, dim: int, entries: list[Any]) -> list[int | None] | None:
    """The one dim of `count` that every entry of an index is about; None if `dim` is in a mask."""
    used = sum(
        each.dim() if isinstance(each, Tensor) and each.dtype == torch.bool else 1
        for each in entries
        if each is not None and each is not Ellipsis
    )
    dims: list[int | None] = []
    at = 0
    for each in entries:
        if each is None:
            dims.append(None)
        elif each is Ellipsis:
            dims.append(None)
            at += count - used
        elif isinstance(each, Tensor) and each.dtype == torch.bool:
            if at <= dim < at + each.dim():
                return None
            dims.append(None)
            at += each.dim()
        else:
            dims.append(at)
            at += 1
    return dims


@rule("setitem")
def setitem(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Written to the part where the index takes the cut dim whole, or reads a view of the part."""
    x, index, value = args
    entries = list(index) if isinstance(index, tuple) else [index]
    if len(entries) == 1 and isinstance(entries[0], CutTensor) and entries[0].shape == x.shape:
        run(Tensor.masked_fill_, (x, entries[0], value), {})
        return None
    entries = [whole(each, "index") if isinstance(each, CutTensor) else each for each in entries]
    if not isinstance(x, CutTensor) and not _adopted(x, entries, value):
        gathered(func, name, (x, tuple(entries), value), kwargs)
        return None
    if _written_to_part(x, entries, value):
        return None
    if not any(isinstance(each, Tensor | list) for each in entries):
        seen = RULES["view"](Tensor.__getitem__, "getitem", (x, tuple(entries)), {})
        if isinstance(seen, CutTensor) and seen.local.untyped_storage().data_ptr() == (
            x.local.untyped_storage().data_ptr()
        ):
            if isinstance(value, Tensor | CutTensor):
                run(Tensor.copy_, (seen, value), {})
            else:
                seen.local.fill_(value)
            return None
    gathered(func, name, (x, tuple(entries), value), kwargs)
    return None


def _written_to_part(x: CutTensor, entries: list[Any], value: Any) -> bool:
    dim = _dim_left(x.shape, x.spec.dim, entries)
    if dim is None:
        return False
    index = tuple(
        slice(None) if source == x.spec.dim else each
        for source, each in zip(
            _source_dims(x.dim(), x.spec.dim, entries) or [], entries, strict=True
        )
    )
    if isinstance(value, Tensor | CutTensor):
        shape = list(torch.zeros((), device=x.device).expand(x.local.shape)[index].shape)
        shape[dim] = x.shape[x.spec.dim]
        value = fitted(value, x.spec.region.spec(tuple(shape), dim, x.spec.cut), x.who)
    x.local[index] = value
    return True


def _adopted(x: Tensor, entries: list[Any], value: Any) -> bool:
    """Whether a whole tensor could take the cut of what is written to a part of it."""
    if not isinstance(value, CutTensor):
        return False
    size, behind = value.shape[value.spec.dim], value.dim() - value.spec.dim
    for dim in range(x.dim()):
        place = _dim_left(x.shape, dim, entries) if x.shape[dim] == size else None
        if place is not None and x[tuple(entries)].dim() - place == behind:
            spec = value.spec
            return adopt(x, spec.region.spec(tuple(x.shape), dim, spec.cut), value.who)
    return False


_LINES = frozenset(
    """gather take_along_dim scatter scatter_add scatter_reduce scatter_ scatter_add_
    scatter_reduce_""".split()  # noqa: SIM905
)


@rule(
    *_LINES,
    *"""index_select index_add index_copy index_fill index_reduce index_add_ index_copy_ index_fill_
    index_reduce_""".split(),  # noqa: SIM905
)
def along(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Picks or writes along one dim, which is not the cut one."""
    names = ("input", "dim", "index", "source")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, dim = given.get("input"), given.get("dim")
    if not isinstance(x, Tensor | CutTensor) or not isinstance(dim, int):
        return gathered(func, name, args, kwargs)
    dim %= x.dim()
    if name == "index_select" and isinstance(x, CutTensor) and x.spec.dim == dim:
        return _selected(x, dim, given["index"])
    if name not in _LINES and isinstance(given["index"], CutTensor):
        given["index"] = whole(given["index"], name)
    parts = {
        key: each
        for key, each in given.items()
        if isinstance(each, Tensor | CutTensor) and (name in _LINES or key != "index")
    }
    met = _lying_along(list(parts.values()), dim)
    if met is None:
        return gathered(func, name, args, kwargs)
    spec, who = met
    if name.endswith("_") and not isinstance(x, CutTensor):
        made = spec.region.spec(tuple(x.shape), spec.dim, spec.cut)
        if not adopt(x, made, who):
            return gathered(func, name, args, kwargs)
    for key, each in parts.items():
        own = spec.region.spec(tuple(each.shape), spec.dim, spec.cut)
        given[key] = fitted(each, own, who)
    order = [given[key] for key in names[: len(args)]]
    y = invariant(spec.region, func, who)(
        *order, *args[len(names) :], **{key: given[key] for key in kwargs}
    )
    if name.endswith("_"):
        return x
    return cut_tensor(y, spec.of_part(y.shape), who)


def _selected(x: CutTensor, dim: int, index: Any) -> Any:
    index = whole(index, "index_select") if isinstance(index, CutTensor) else index
    return looked_up(x, dim, index.reshape(-1))


def _lying_along(tensors: list[Any], dim: int) -> tuple[Spec, str] | None:
    """How tensors of the same dims lie, whatever their sizes along `dim`; None: not alike."""
    cuts = [each for each in tensors if isinstance(each, CutTensor)]
    if not cuts or any(each.spec.dim == dim or each.dim() != cuts[0].dim() for each in cuts):
        return None
    shape = [1 if d == dim else size for d, size in enumerate(cuts[0].shape)]
    if any(
        each.dim() != len(shape) or each.shape[cuts[0].spec.dim] != shape[cuts[0].spec.dim]
        for each in tensors
    ):
        return None
    return common([one_along(each, dim) for each in cuts], tuple(shape))
