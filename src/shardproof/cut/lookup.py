"""Rules for lookups by index: embeddings, indexing, gather and scatter."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof import operators
from shardproof.cut.adopted import adopt
from shardproof.cut.alignment import common, fitted, one_along
from shardproof.cut.fallback import gathered, invariant, whole
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import RULES, CutTensor, cut_tensor, named, rule, run
from shardproof.ops import unit_ops


@rule("embedding")
def embedding(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.embedding` with a weight that is cut by rows or by columns."""
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
    """`x[...]`: slices move data, and index tensors pick along whole dims."""
    x, index = args
    if not isinstance(x, CutTensor):
        return gathered(func, name, args, kwargs)
    index_entries = index if isinstance(index, tuple) else (index,)
    if _WITHOUT_NUMBERS.issuperset(map(type, index_entries)):
        return RULES["view"](func, name, (x, index_entries), {})
    entries = list(index_entries)
    entries = [whole(each, "index") if isinstance(each, CutTensor) else each for each in entries]
    if sum(isinstance(each, Tensor | list) for each in entries) == 1:
        entries = [_as_slice(each) if isinstance(each, list) else each for each in entries]
    if not any(isinstance(each, Tensor | list) for each in entries):
        return RULES["view"](func, "getitem", (x, tuple(entries)), {})
    return _picked(func, x, entries)


_WITHOUT_NUMBERS = frozenset((int, slice, type(None), type(Ellipsis)))


def _as_slice(numbers: list[Any]) -> Any:
    """A list of one index as a slice, which keeps the dim."""
    if len(numbers) != 1 or not isinstance(numbers[0], int) or isinstance(numbers[0], bool):
        return numbers
    return slice(numbers[0], numbers[0] + 1 or None)


def _picked(func: Any, x: CutTensor, entries: list[Any]) -> Any:
    """Advanced indexing; rows are looked up if the index picks along the cut dim."""
    dim = _dim_left(x.shape, x.spec.dim, entries)
    if dim is None:
        rows = _rows_picked(x, entries)
        return gathered(func, "getitem", (x, tuple(entries)), {}) if rows is None else rows
    y = x.local[tuple(entries)]
    return cut_tensor(y, x.spec.of_part(y.shape, dim), x.who)


def _rows_picked(x: CutTensor, entries: list[Any]) -> Any:
    """Pick along the cut dim alone: each rank contributes the rows that it holds."""
    index = entries[x.spec.dim] if len(entries) > x.spec.dim and Ellipsis not in entries else None
    others = [each for place, each in enumerate(entries) if place != x.spec.dim]
    if not isinstance(index, Tensor) or index.dtype not in _INTEGERS or not index.dim():
        return None
    if any(not isinstance(each, slice) or each != slice(None) for each in others):
        return None
    return looked_up(x, x.spec.dim, index)


_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


def looked_up(x: CutTensor, dim: int, index: Tensor) -> Tensor:
    """`x[:, index]` along the cut dim `dim`: a lookup of rows, whole on every rank.

    Args:
        x: (*, size, *), Shard(dim).
        dim: the dim that is indexed.
        index: (*ids,), row numbers.
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
    """The position of a dim in `x[entries]`; None if the index does not take all of it."""
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
    """The position in `x[entries]` of a dim that is taken whole."""
    small = [*shape[:dim], 3, *shape[dim + 1 :]]
    whole_ = [
        slice(None) if source == dim else _zero_index(each)
        for source, each in zip(at, entries, strict=True)
    ]
    numbers = torch.arange(3, device="cpu").reshape(
        [-1 if d == dim else 1 for d in range(len(shape))]
    )
    picked = numbers.expand(small)[tuple(whole_)]
    if not picked.numel():
        return None
    return next((d for d in range(picked.dim()) if _varies(picked, d)), None)


def _zero_index(index: Any) -> Any:
    """A zero index of the same shape on the CPU; dims move alike for any index values."""
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
    """The dim that each entry of an index refers to; None if a mask covers `dim`."""
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
    """`x[...] = value`: written to the part if the index keeps the cut dim or gives a view."""
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
        view = RULES["view"](Tensor.__getitem__, "getitem", (x, tuple(entries)), {})
        if isinstance(view, CutTensor) and view.local.untyped_storage().data_ptr() == (
            x.local.untyped_storage().data_ptr()
        ):
            if isinstance(value, Tensor | CutTensor):
                run(Tensor.copy_, (view, value), {})
            else:
                view.local.fill_(value)
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
    """Whether a whole tensor was turned into a cut one, as the written value is cut."""
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
    """Gather, scatter and index operations along a dim other than the cut one."""
    names = ("input", "dim", "index", "source")
    options = dict(zip(names, args, strict=False)) | kwargs
    x, dim = options.get("input"), options.get("dim")
    if not isinstance(x, Tensor | CutTensor) or not isinstance(dim, int):
        return gathered(func, name, args, kwargs)
    dim %= x.dim()
    if name == "index_select" and isinstance(x, CutTensor) and x.spec.dim == dim:
        return _selected(x, dim, options["index"])
    if name not in _LINES and isinstance(options["index"], CutTensor):
        options["index"] = whole(options["index"], name)
    parts = {
        key: each
        for key, each in options.items()
        if isinstance(each, Tensor | CutTensor) and (name in _LINES or key != "index")
    }
    spec_and_who = _lying_along(list(parts.values()), dim)
    if spec_and_who is None:
        return gathered(func, name, args, kwargs)
    spec, who = spec_and_who
    if name.endswith("_") and not isinstance(x, CutTensor):
        result_spec = spec.region.spec(tuple(x.shape), spec.dim, spec.cut)
        if not adopt(x, result_spec, who):
            return gathered(func, name, args, kwargs)
    for key, each in parts.items():
        own = spec.region.spec(tuple(each.shape), spec.dim, spec.cut)
        options[key] = fitted(each, own, who)
    order = [options[key] for key in names[: len(args)]]
    y = invariant(spec.region, func, who)(
        *order, *args[len(names) :], **{key: options[key] for key in kwargs}
    )
    if name.endswith("_"):
        return x
    return cut_tensor(y, spec.of_part(y.shape), who)


def _selected(x: CutTensor, dim: int, index: Any) -> Any:
    index = whole(index, "index_select") if isinstance(index, CutTensor) else index
    return looked_up(x, dim, index.reshape(-1))


def _lying_along(tensors: list[Any], dim: int) -> tuple[Spec, str] | None:
    """How the tensors are cut, whatever their sizes along `dim`; None if they differ."""
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
