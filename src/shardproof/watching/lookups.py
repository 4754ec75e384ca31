"""Watching rules for operations that read or write elements by an index."""

from typing import Any

import torch
from torch import Tensor

from shardproof.watching.atoms import Labels
from shardproof.watching.factors import Factors, Operand, combine, compress, settle, varying
from shardproof.watching.kinds import name_of
from shardproof.watching.labelled import Labelled, factors_of, parameter_of
from shardproof.watching.moving import expanded, shrink
from shardproof.watching.record import Record
from shardproof.watching.rules import rule, whole_along


def index_values(index: Any) -> Tensor | None:
    """The value of an index, if it is known."""
    if not isinstance(index, Labelled):
        return index if isinstance(index, Tensor) else None
    return index.value if index.inside.device.type == "meta" else index.inside


def _alone(x: Labelled, factor: Labels) -> Labelled:
    return Labelled(x.inside, (factor,), parameter=x.parameter)


@rule("embedding")
def embedding(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Rows of a table (rows, features), picked by index."""
    table, result = args[0], []
    for factor in factors_of(table):
        if varying(factor) == (0,):
            record.see("lookup", "embedding", factor, table.parameter)
        elif varying(factor) in ((1,), ()):
            result.append(factor.reshape((1,) * (outs[0].dim() - 1) + (-1,)))
        else:
            record.see("gather", "embedding", factor, table.parameter)
    return [tuple(result)]


@rule("index_select")
def index_select(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """`index_select`: some indices of one dim."""
    x, dim, values = args[0], args[1], index_values(args[2])
    dim %= max(x.dim(), 1)
    result: list[Labels] = []
    for factor in factors_of(x):
        if dim not in varying(factor):
            result.append(factor)
        elif values is not None:
            picked = compress(factor.take(values.numpy(), axis=dim), record)
            result += [] if picked is None else [picked]
        elif x.parameter and len(varying(factor)) == 1:
            record.see("lookup", "index_select", factor, x.parameter)
        else:
            result += whole_along(_alone(x, factor), (dim,), "index_select", record)
    return [tuple(result)]


@rule("index _unsafe_index")
def index(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """`x[indices]`: advanced indexing with several index tensors."""
    x, indices = args[0], args[1]
    for each in indices:
        for factor in factors_of(each):
            record.see("gather", "index", factor)
    places = [dim for dim, each in enumerate(indices) if each is not None]
    values = [index_values(each) for each in indices if each is not None]
    is_known = all(value is not None for value in values)
    result: list[Labels] = []
    for factor in factors_of(x):
        hit = set(varying(factor)) & set(places)
        if hit and x.parameter and len(varying(factor)) == 1 and x.dim() == 2:
            record.see("lookup", "index", factor, x.parameter)
            continue
        if hit and not is_known:
            whole_factors = whole_along(_alone(x, factor), tuple(hit), "index", record)
            if not whole_factors:
                continue
            factor = whole_factors[0]
            hit = set()
        picked = compress(_picked(func, factor, x, indices, bool(hit)), record)
        if picked is not None:
            result.append(picked)
    return [settle(result, record)]


def _picked(func: Any, factor: Labels, x: Labelled, indices: Any, by_value: bool) -> Labels:
    """The labels that the indices pick; by shape alone if none varies along an indexed dim."""
    if by_value:
        values = [None if each is None else index_values(each) for each in indices]
        return shrink(func(expanded(factor, x.shape), values))
    # The labels do not vary along the indexed dims, so every index picks the same labels.
    slim = [
        1 if each is not None else size for each, size in zip(indices, factor.shape, strict=False)
    ]
    slim += list(factor.shape[len(indices) :])
    zeros = [
        None if each is None else torch.zeros((1,) * each.dim(), dtype=torch.int64, device="cpu")
        for each in indices
    ]
    return shrink(func(torch.from_numpy(factor.reshape(slim)), zeros))


@rule("gather take_along_dim")
def gather(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """`gather`: elements along one dim, with an own index at each position."""
    x, dim, where = args[0], args[1], args[2]
    whole_factors = whole_along(x, (dim,), "gather", record)
    operands: list[Operand] = [
        (f, parameter_of(x) is not None) for f in whole_factors if _fits(f, outs[0])
    ]
    operands += [(f, False) for f in whole_along(where, (dim,), "gather", record)]
    return [combine([each for each in operands if _fits(each[0], outs[0])], "gather", record)]


def _fits(factor: Labels, out: Tensor) -> bool:
    return factor.ndim == out.dim() and all(
        size in (1, of) for size, of in zip(factor.shape, out.shape, strict=True)
    )


@rule(
    "index_add_ index_add index_copy_ index_copy scatter_add scatter_add_ scatter_ scatter"
    " scatter_reduce scatter_reduce_ index_reduce_ index_fill_ index_fill"
)
def write_rows(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Operations that write or add values at indices of one dim."""
    name, dim = name_of(func), args[1]
    operands: list[Operand] = []
    for each in (args[0], *args[3:4], *(kwargs.get(key) for key in ("src", "source", "value"))):
        for factor in whole_along(each, (dim,), name, record):
            if factor.ndim == outs[0].dim() and _fits(factor, outs[0]):
                operands.append((factor, False))
    return [combine(operands, name, record)]


@rule("index_put_ index_put _index_put_impl_ _unsafe_index_put")
def write_places(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """`index_put`: values that are written by advanced indexing."""
    x, indices, source = args[:3]
    name, nd = name_of(func), outs[0].dim()
    dims = _value_dims(indices, nd)
    operands: list[Operand] = [(factor, False) for factor in factors_of(x)]
    for factor in factors_of(source):
        mine = dims[len(dims) - factor.ndim :]
        if all(mine[dim] is not None for dim in varying(factor)):
            shape = [1] * nd
            for dim in varying(factor):
                shape[mine[dim] or 0] = factor.shape[dim]
            fitted = factor.reshape(shape)
            if _fits(fitted, outs[0]):
                operands.append((fitted, False))
                continue
        record.see("gather", name, factor, parameter_of(source))
    return [combine(operands, name, record)]


def _value_dims(indices: Any, ndim: int) -> list[int | None]:
    """The tensor dim of each dim of the written values; None for dims of the indices."""
    indexed = [dim for dim, each in enumerate(indices) if each is not None]
    free = [dim for dim in range(ndim) if dim not in indexed]
    width = max((indices[dim].dim() for dim in indexed), default=0)
    are_together = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else True
    before = [dim for dim in free if indexed and dim < indexed[0]] if are_together else []
    after = [dim for dim in free if dim not in before]
    return [*before, *[None] * width, *after]
