"""Rows by number: embeddings, indexing, gathers and scatters; and losses over a cut vocabulary."""

from typing import Any

import torch
from torch import Tensor

from shardproof.cut.linear import _named
from shardproof.cut.meet import fitted
from shardproof.cut.others import gathered, whole
from shardproof.cut.tensor import RULES, CutTensor, cut_tensor, rule, run
from shardproof.functional import crossings


@rule("embedding")
def embedding(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.embedding` of a weight that is cut by rows or by columns."""
    ids, weight, padding, most = _named(args, kwargs, "input", "weight", "padding_idx", "max_norm")
    by_count = args[5] if len(args) > 5 else kwargs.get("scale_grad_by_freq", False)
    if isinstance(ids, CutTensor) or not isinstance(weight, CutTensor) or most is not None:
        return gathered(func, name, args, kwargs)
    spec = weight.spec
    place = spec.region.place(spec.cut, weight.who)
    options = {"padding_idx": padding, "scale_grad_by_freq": bool(by_count)}
    if spec.dim == 0:
        return crossings.lookup_rows(weight.local, ids, place, **options)
    y = crossings.lookup_columns(weight.local, ids, place, **options)
    shape = (*ids.shape, weight.shape[1])
    return cut_tensor(y, spec.region.spec(shape, len(shape) - 1, spec.cut), weight.who)


@rule("getitem")
def getitem(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Slices move data; tensors of numbers pick along whole dims."""
    x, index = args
    if not isinstance(x, CutTensor):
        return gathered(func, name, args, kwargs)
    entries = list(index) if isinstance(index, tuple) else [index]
    entries = [whole(each, "index") if isinstance(each, CutTensor) else each for each in entries]
    if sum(isinstance(each, Tensor | list) for each in entries) == 1:
        entries = [_as_slice(each) if isinstance(each, list) else each for each in entries]
    if not any(isinstance(each, Tensor | list) for each in entries):
        return RULES["view"](func, "getitem", (x, tuple(entries)), {})
    return _picked(func, x, entries)


def _as_slice(numbers: list[Any]) -> Any:
    """A list of one number is a slice: the dim stays."""
    if len(numbers) != 1 or not isinstance(numbers[0], int) or isinstance(numbers[0], bool):
        return numbers
    return slice(numbers[0], numbers[0] + 1 or None)


def _picked(func: Any, x: CutTensor, entries: list[Any]) -> Any:
    """Advanced indexing in which the cut dim is taken whole."""
    places = _source_dims(x, entries)
    if places is None:
        return gathered(func, "getitem", (x, tuple(entries)), {})
    if any(
        source == x.spec.dim and not (isinstance(each, slice) and each == slice(None))
        for source, each in zip(places, entries, strict=True)
        if source is not None
    ):
        return gathered(func, "getitem", (x, tuple(entries)), {})
    index = tuple(entries)
    y = x.local[index]
    probe = torch.zeros((), dtype=torch.int64, device="cpu").expand(x.local.shape)
    shape = [1] * x.dim()
    shape[x.spec.dim] = -1
    held = x.local.shape[x.spec.dim]
    del probe
    numbers = torch.arange(held, device=x.device).reshape(shape).expand(x.local.shape)[index]
    dims = [d for d in range(numbers.dim()) if held < 2 or _varies(numbers, d)]
    dims = [d for d in dims if y.shape[d] == held]
    if len(dims) != 1 and held >= 2:
        return gathered(func, "getitem", (x, tuple(entries)), {})
    dim = dims[0] if held >= 2 else _place_of(x, entries)
    full = (*y.shape[:dim], x.shape[x.spec.dim], *y.shape[dim + 1 :])
    return cut_tensor(y, x.spec.region.spec(full, dim, x.spec.cut), x.who)


def _varies(numbers: Tensor, dim: int) -> bool:
    return numbers.shape[dim] > 1 and bool((numbers.narrow(dim, 0, 1) != numbers).any())


def _place_of(x: CutTensor, entries: list[Any]) -> int:
    """Where the cut dim is in the result, found on a small tensor of the same kind."""
    shape = list(x.local.shape)
    shape[x.spec.dim] = 3
    numbers = (
        torch.arange(3, device=x.device)
        .reshape([-1 if d == x.spec.dim else 1 for d in range(len(shape))])
        .expand(shape)[tuple(entries)]
    )
    return next(d for d in range(numbers.dim()) if _varies(numbers, d))


def _source_dims(x: CutTensor, entries: list[Any]) -> list[int | None] | None:
    """The dim that every entry of an index is about; None for a new one; None if it is unclear."""
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
            skipped = x.dim() - used
            if at <= x.spec.dim < at + skipped:
                dims.append(None)
            else:
                dims.append(None)
            at += skipped
        elif isinstance(each, Tensor) and each.dtype == torch.bool:
            if at <= x.spec.dim < at + each.dim():
                return None
            dims.append(None)
            at += each.dim()
        else:
            dims.append(at)
            at += 1
    return dims


@rule("setitem")
def setitem(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Written to what the same index reads, where that is a view of the part."""
    x, index, value = args
    if isinstance(x, CutTensor):
        entries = index if isinstance(index, tuple) else (index,)
        if not any(isinstance(each, Tensor | list | CutTensor) for each in entries):
            seen = RULES["view"](Tensor.__getitem__, "getitem", (x, entries), {})
            if isinstance(seen, CutTensor) and seen.local.untyped_storage().data_ptr() == (
                x.local.untyped_storage().data_ptr()
            ):
                if not isinstance(value, Tensor | CutTensor):
                    seen.local.fill_(value)
                    return None
                run(Tensor.copy_, (seen, value), {})
                return None
    gathered(func, name, args, kwargs)
    return None


@rule(
    "index_select",
    "gather",
    "take_along_dim",
    "index_add",
    "index_copy",
    "scatter",
    "scatter_add",
    "index_fill",
    "scatter_reduce",
    "index_reduce",
    "index_add_",
    "index_copy_",
    "scatter_",
    "scatter_add_",
    "index_fill_",
)
def along(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Picks or writes along one dim."""
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(x, CutTensor) or not isinstance(dim, int) or dim % x.dim() == x.spec.dim:
        return gathered(func, name, args, kwargs)
    is_lines = name in (
        "gather",
        "take_along_dim",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "scatter_",
        "scatter_add_",
    )

    def part(each: Any, is_index: bool) -> Any:
        if not isinstance(each, Tensor | CutTensor):
            return each
        if is_index and not is_lines:
            return whole(each, name) if isinstance(each, CutTensor) else each
        shape = list(each.shape)
        spec = x.spec.region.spec(tuple(shape), x.spec.dim, x.spec.cut)
        if each.dim() != x.dim() or each.shape[x.spec.dim] != x.shape[x.spec.dim]:
            raise _Unlike
        return fitted(each, spec, x.who)

    try:
        rest = [part(each, n == 0) for n, each in enumerate(args[2:])]
        options = {key: part(each, key == "index") for key, each in kwargs.items() if key != "dim"}
    except _Unlike:
        return gathered(func, name, args, kwargs)
    if "dim" in kwargs:
        options["dim"] = dim
    y = func(x.local, *args[1:2], *rest, **options)
    if name.endswith("_"):
        return x
    shape = (*y.shape[: x.spec.dim], x.shape[x.spec.dim], *y.shape[x.spec.dim + 1 :])
    return cut_tensor(y, x.spec.region.spec(shape, x.spec.dim, x.spec.cut), x.who)


class _Unlike(Exception):  # noqa: N818 - it never leaves this file
    """An operand does not lie along the cut dim as the first does."""
