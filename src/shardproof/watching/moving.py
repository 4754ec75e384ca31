"""Watching rules for operations that only move elements: the same operation runs on the labels.

Dims in which labels do not vary keep size 1 if the operation allows it, or are expanded without
memory. So labels are as large as the activation only if they vary along all of its dims.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardproof.watching.atoms import Labels
from shardproof.watching.factors import Factors, combine, compress, reduce_lines, settle, varying
from shardproof.watching.kinds import IDENTITIES, name_of
from shardproof.watching.labelled import Labelled, factors_of
from shardproof.watching.record import Record

RESHAPES = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "flatten",
))  # fmt: skip
MOST_ELEMENTS = 1 << 26  # most labels that an operation may create for one factor


def regroup(factor: Labels, old: Sequence[int], new: Sequence[int]) -> Labels:
    """Labels of a tensor that is viewed in another shape.

    Dims are expanded only if they are split or merged with a dim in which labels vary.
    """
    expanded, target = list(factor.shape), list(new)
    for before, after in _groups(old, new):
        if any(factor.shape[dim] > 1 for dim in before):
            for dim in before:
                expanded[dim] = old[dim]
        else:
            for dim in after:
                target[dim] = 1
    return np.broadcast_to(factor, expanded).reshape(target)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """The shortest runs of dims of both shapes with equal numbers of elements."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        size_i = size_j = 1
        if i < len(old):
            size_i, i = old[i], i + 1
        if j < len(new):
            size_j, j = new[j], j + 1
        while size_i != size_j:
            if size_i < size_j:
                size_i, i = size_i * old[i], i + 1
            else:
                size_j, j = size_j * new[j], j + 1
        groups.append((range(start_i, i), range(start_j, j)))
    return groups


def shrink(labels: Tensor) -> Labels:
    """The labels as an array, with size 1 along dims that were expanded without memory."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels.numpy()


def expanded(factor: Labels, shape: Sequence[int]) -> Tensor:
    """A factor as a tensor of the whole shape, expanded without memory."""
    return torch.from_numpy(np.ascontiguousarray(factor)).expand(tuple(shape))


def move(func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record) -> Any:
    """Factors of every output of an operation that moves the elements of its first argument."""
    name, x = name_of(func), args[0]
    if name in ("cat", "stack"):
        return [concatenate(name, args, kwargs, outs[0], record)]
    if name in IDENTITIES:
        return [tuple(x.factors)]
    result: list[list[Labels]] = [[] for _ in outs]
    for factor in x.factors:
        moved = _moved(name, func, factor, x, (args[1:], kwargs), outs, record)
        if moved is None:
            record.see("gather", name, factor, x.parameter)
            continue
        for number, each in enumerate(moved):
            small = compress(each, record)
            if small is not None:
                result[number].append(small)
    if (
        x.parameter is not None
    ):  # a later operation shows which of two factors along one dim matters
        return [tuple(factors) for factors in result]
    return [settle(factors, record) for factors in result]


def _moved(
    name: str, func: Any, factor: Labels, x: Labelled, more: Any, outs: list[Tensor], record: Record
) -> list[Labels] | None:
    """Apply the operation to one factor, for each output; None if that would be too large."""
    args, kwargs = more
    if name == "view" and isinstance(args[0], torch.dtype):
        return [factor] if outs[0].shape == x.shape else [reduce_lines(factor, (-1,), record)]
    if name in RESHAPES:
        regrouped = regroup(factor, x.shape, outs[0].shape)
        if len(varying(factor)) == 1:
            record.keep_box(regrouped, is_split=True)
        return [regrouped]
    if name == "view_as_complex":
        return [reduce_lines(factor, (-1,), record)[..., 0]]
    if name == "view_as_real":
        return [factor[..., None]]
    if name == "repeat":
        return [_repeat(factor, x.shape, args[0])]
    dims = varying(factor)
    if name == "select" and x.parameter and len(dims) > 1 and args[0] % x.dim() in dims:
        # A stack of matrices, such as experts: if the stack was cut, each select would gather.
        return [reduce_lines(factor, (args[0],), record).squeeze(args[0])]
    if name in ("flip", "roll", "constant_pad_nd"):
        by_dim = {"flip": _flip, "roll": _roll, "constant_pad_nd": _pad}[name]
        return [by_dim(factor, args, kwargs)]
    full = expanded(factor, x.shape)
    if sum(out.numel() for out in outs) > MOST_ELEMENTS and not _is_free(func):
        return None
    try:
        moved = func(full, *args, **kwargs)
    except (RuntimeError, NotImplementedError):
        if full.numel() > MOST_ELEMENTS:
            return None
        moved = func(
            full.contiguous(), *args, **kwargs
        )  # the operation does not accept these strides
    return [shrink(each) for each in ([moved] if isinstance(moved, Tensor) else moved)]


def _is_free(func: Any) -> bool:
    return func._schema.returns[0].alias_info is not None


def _repeat(factor: Labels, shape: Sequence[int], times: Sequence[int]) -> Labels:
    factor = factor.reshape((1,) * (len(times) - factor.ndim) + factor.shape)
    sizes = (1,) * (len(times) - len(shape)) + tuple(shape)
    is_free = [f == 1 and size != 1 for f, size in zip(factor.shape, sizes, strict=True)]
    # A dim without different labels keeps size 1; a dim with different labels is repeated.
    return np.tile(
        factor,
        [
            1 if free or size == 1 else count
            for free, size, count in zip(is_free, sizes, times, strict=True)
        ],
    )


def _flip(factor: Labels, args: Any, kwargs: Any) -> Labels:
    return np.flip(factor, args[0] if args else kwargs["dims"])


def _roll(factor: Labels, args: Any, kwargs: Any) -> Labels:
    dims = args[1] if len(args) > 1 else kwargs.get("dims", ())
    if not len(dims):
        return factor if factor.size == 1 else np.roll(factor, args[0])
    return np.roll(factor, tuple(args[0]), tuple(dims))


def _pad(factor: Labels, args: Any, kwargs: Any) -> Labels:
    """Padding has label 0; along dims in which labels do not vary it gets the same label."""
    widths = [(0, 0)] * factor.ndim
    for number in range(len(args[0]) // 2):
        dim = factor.ndim - 1 - number
        if factor.shape[dim] > 1:
            widths[dim] = (args[0][2 * number], args[0][2 * number + 1])
    cropped = factor[
        tuple(
            slice(max(0, -low), size - max(0, -high))
            for (low, high), size in zip(widths, factor.shape, strict=True)
        )
    ]
    return np.pad(cropped, [(max(0, low), max(0, high)) for low, high in widths])


def concatenate(
    name: str, args: tuple[Any, ...], kwargs: Any, out: Tensor, record: Record
) -> Factors:
    """`cat` and `stack`: concatenate the labels."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    parts: list[tuple[tuple[int, ...], list[Labels]]] = []
    for each in args[0]:
        shape, factors = tuple(each.shape), [*factors_of(each)]
        if name == "stack":
            shape = (*shape[:dim], 1, *shape[dim:])
            factors = [np.expand_dims(factor, dim) for factor in factors]
        elif len(shape) != out.dim():
            continue  # an empty vector, which torch.cat ignores
        parts.append((shape, factors))
    everything = [factor for _, factors in parts for factor in factors]
    if name == "cat" and not any(dim in varying(factor) for factor in everything):
        is_plain = all(len({varying(f) for f in factors}) == len(factors) for _, factors in parts)
        if is_plain:  # all operands have labels along the same other dims
            return combine([(factor, False) for factor in everything], name, record)
    joined_factors = []
    for dims in _tracks(parts, dim):
        joined = compress(_one_after_another(parts, dims, dim), record)
        if joined is not None:
            joined_factors.append(joined)
    return (
        combine([(each, False) for each in joined_factors], name, record)
        if len(joined_factors) > 1
        else tuple(joined_factors)
    )


def _tracks(parts: Any, dim: int) -> list[set[frozenset[int]]]:
    """Group the factors of the parts that are concatenated: equal other dims in which they vary."""
    keys: list[frozenset[int]] = []
    for _, factors in parts:
        for factor in factors:
            key = frozenset(varying(factor)) - {dim}
            if key not in keys:
                keys.append(key)
    if all(len(factors) <= 1 for _, factors in parts):
        return [set(keys)] if keys else []
    return [{key} for key in keys]


def _one_after_another(parts: Any, keys: set[frozenset[int]], dim: int) -> Labels:
    """Concatenate along `dim`, with 0 for parts without such labels."""
    varied = frozenset().union(*keys)
    arrays = []
    for shape, factors in parts:
        mine = [factor for factor in factors if frozenset(varying(factor)) - {dim} in keys]
        target = [size if d == dim or d in varied else 1 for d, size in enumerate(shape)]
        zero = np.zeros((1,) * len(shape), dtype=np.int64)
        arrays.append(np.broadcast_to(mine[0] if mine else zero, target))
    return np.concatenate(arrays, dim)
