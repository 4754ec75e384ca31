"""One rule for all operations that only move data: views, slices, splits, copies.

The operation runs once on a tensor of index numbers: each element holds its index along the cut
dim. The numbers in the result show how the result is cut, and which call on the part gives this
rank's part of it. That call is kept as a recipe. A recipe is correct because its call was run on
this rank's numbers and compared with the expected ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardproof import operators
from shardproof.cut.deferred import defer
from shardproof.cut.fallback import gathered
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor, rule, run
from shardproof.errors import ShapeError
from shardproof.numerics import forms
from shardproof.units import CutDim, Shared

LARGEST = 1 << 24  # elements of the index tensor of one recipe

_MOVES = """view reshape view_as reshape_as transpose permute movedim moveaxis swapaxes swapdims t
    squeeze unsqueeze flatten unflatten ravel expand expand_as broadcast_to repeat tile chunk
    split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind select narrow
    narrow_copy flip fliplr flipud roll rot90 contiguous clone detach alias slice
    repeat_interleave adjoint unsafe_view _unsafe_view _reshape_alias hsplit vsplit dsplit
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle lift_fresh unsqueeze_
    squeeze_ transpose_ t_ swapaxes_ detach_ unsafe_split_with_sizes unfold""".split()  # noqa: SIM905
_SAME = frozenset(("clone", "detach", "contiguous", "alias", "lift_fresh", "detach_"))
_SIZED = frozenset(
    """view reshape view_as reshape_as flatten unflatten ravel squeeze unsqueeze unsafe_view
    _unsafe_view _reshape_alias""".split()  # noqa: SIM905
)

Step = Callable[[Tensor], Tensor]


class Lost(Exception):  # noqa: N818 - it never leaves this room
    """The result of an operation that cannot be cut along one dim."""


@rule(*_MOVES)
def move(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Find the recipe of an operation, and run it."""
    x = args[0]
    if not isinstance(x, CutTensor):
        return _of_others(func, name, args, kwargs)
    if name in _SAME:
        return cut_tensor(func(x.local, *args[1:], **kwargs), x.spec, x.who)
    rest = args[1:]
    if name in ("view_as", "reshape_as", "expand_as"):
        other = rest[0] if rest else kwargs["other"]
        name, func = name.removesuffix("_as"), getattr(Tensor, name.removesuffix("_as"))
        rest, kwargs = tuple(other.shape), {}
    if name == "view" and rest and isinstance(rest[0], torch.dtype):
        if rest[0].itemsize != x.dtype.itemsize:
            return gathered(func, name, args, kwargs)
        return cut_tensor(x.local.view(rest[0]), x.spec, x.who)
    try:
        numbers = _NUMBERS.issuperset(map(type, rest))
        key = (func, x.spec, *(rest if numbers else map(_key, rest)))
        if kwargs:
            key = (*key, *((name, _key(each)) for name, each in kwargs.items()))
        recipe = x.spec.region.recipes.get(key)
        if recipe is None:
            quick = _QUICK.get(name)
            recipe = quick(x.spec, rest) if quick is not None and not kwargs else None
            if recipe is None:
                recipe = find(func, name, x.spec, rest, kwargs)
            x.spec.region.recipes[key] = recipe
    except _Unkeyed:
        try:
            sizes = _as_sizes(rest)
        except _Unkeyed:
            return gathered(func, name, args, kwargs)
        return gathered(func, name, args, kwargs) if kwargs else move(func, name, (x, *sizes), {})
    if recipe is LOST:
        return _lost(func, name, x, args, kwargs)
    many, outs = recipe
    if many is None:
        ((step, spec),) = outs
        return _result_of(step, spec, x)
    return many([_result_of(step, spec, x) for step, spec in outs])


@rule("diagonal")
def diagonal(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.diagonal` of two dims; a copy if one of them is cut.

    In that case the elements outside the diagonal are set to zero and the other dim is summed.
    """
    x, *rest = args
    options = {"offset": 0, "dim1": 0, "dim2": 1} | kwargs
    options |= dict(zip(("offset", "dim1", "dim2"), rest, strict=False))
    offset, dims = options["offset"], [options[key] for key in ("dim1", "dim2")]
    places = [dim % x.dim() for dim in dims]
    if places[0] == places[1] or not all(-x.dim() <= dim < x.dim() for dim in dims):
        raise ShapeError(
            f"diagonal of dims {dims[0]} and {dims[1]} of a tensor of shape {tuple(x.shape)}. "
            "Give two different dims that it has."
        )
    rows, columns = (x.shape[place] for place in places)
    if x.spec.dim not in places:
        dim = x.spec.dim - sum(place < x.spec.dim for place in places)
        y = torch.diagonal(x.local, offset, *places)
        return cut_tensor(y, x.spec.of_part(y.shape, dim), x.who)
    size = max(0, min(rows + min(offset, 0), columns - max(offset, 0)))
    is_row = x.spec.dim == places[0]
    mask = torch.ones(rows, columns, dtype=torch.bool, device=x.device)
    mask = mask.tril(offset).triu(offset)
    mask = mask if places[0] < places[1] else mask.t()
    # A mask with the dims of `x`, of size 1 except in the two dims of the diagonal.
    mask = mask.reshape([x.shape[n] if n in places else 1 for n in range(x.dim())])
    diagonal_entries = run(torch.where, (mask, x, x.new_zeros(())), {})
    lines = diagonal_entries.sum(places[is_row], keepdim=True, dtype=x.dtype)
    first = min(max(0, -offset if is_row else offset), x.shape[x.spec.dim])
    lines = lines.narrow(x.spec.dim, first, size).movedim(x.spec.dim, -1)
    return lines.squeeze(places[is_row] - (places[is_row] > x.spec.dim))


def _one(step: Step, result_spec: Spec) -> Any:
    """A recipe for an operation with one result."""
    return None, ((step, result_spec),)


def _transposed(spec: Spec, dims: tuple[Any, ...]) -> Any:
    """The recipe of `transpose`, which needs no numbers."""
    if len(dims) != 2 or not all(type(dim) is int for dim in dims):
        return None
    shape = list(spec.shape)
    a, b = (dim % len(shape) for dim in dims)
    shape[a], shape[b] = shape[b], shape[a]
    dim = b if spec.dim == a else a if spec.dim == b else spec.dim
    result_spec = spec.region.spec(tuple(shape), dim, spec.cut)
    return _one(lambda x: x.transpose(a, b), result_spec)


def _permuted(spec: Spec, dims: tuple[Any, ...]) -> Any:
    """The recipe of `permute`, which needs no numbers."""
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    count = len(spec.shape)
    if len(order) != count or not all(type(dim) is int for dim in order):
        return None
    places = [dim % count for dim in order]
    shape = tuple(spec.shape[dim] for dim in places)
    result_spec = spec.region.spec(shape, places.index(spec.dim), spec.cut)
    return _one(lambda x: x.permute(places), result_spec)


def _unsqueezed(spec: Spec, dims: tuple[Any, ...]) -> Any:
    """The recipe of `unsqueeze`, which needs no numbers."""
    if len(dims) != 1 or type(dims[0]) is not int:
        return None
    count = len(spec.shape) + 1
    place = dims[0] % count
    shape = (*spec.shape[:place], 1, *spec.shape[place:])
    result_spec = spec.region.spec(shape, spec.dim + (place <= spec.dim), spec.cut)
    return _one(lambda x: x.unsqueeze(place), result_spec)


_QUICK = {"transpose": _transposed, "permute": _permuted, "unsqueeze": _unsqueezed}

LOST: Any = object()


def _as_sizes(value: Any) -> Any:
    """Arguments, with a number in place of each whole tensor of one element.

    Raises:
        _Unkeyed: there is a tensor of several elements.
    """
    if isinstance(value, Tensor):
        if isinstance(value, CutTensor) or value.dim():
            raise _Unkeyed
        return int(value)
    if isinstance(value, slice):
        return slice(*map(_as_sizes, (value.start, value.stop, value.step)))
    if isinstance(value, tuple | list):
        sizes = [_as_sizes(each) for each in value]
        return sizes if isinstance(value, list) else tuple(sizes)
    return value


def _lost(func: Any, name: str, x: CutTensor, args: tuple[Any, ...], kwargs: Any) -> Any:
    """A result that cannot be cut along one dim: deferred if possible, else gathered."""
    has_gradient = torch.is_grad_enabled() and x.requires_grad
    if name not in ("reshape", "view") or has_gradient or operators.is_recorded():
        return gathered(func, name, args, kwargs)
    shape = args[1:] if len(args) > 1 else (kwargs["shape"],)
    return defer(x, shape[0] if isinstance(shape[0], list | tuple) else shape)


def _of_others(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on a plain tensor with a cut tensor as an argument, whose shape is used."""
    if name in ("view_as", "reshape_as", "expand_as"):
        return getattr(args[0], name.removesuffix("_as"))(args[1].shape)
    return gathered(func, name, args, kwargs)


def _result_of(step: Step, spec: Spec | None, x: CutTensor) -> Any:
    y = step(x.local)
    return y if spec is None else cut_tensor(y, spec, x.who)


class _Unkeyed(Exception):  # noqa: N818
    """An argument has a value that the recipe depends on, such as a tensor of indices."""


def _key(value: Any) -> Any:
    """An argument as part of a key; 1, True and 1.0 get different keys."""
    kind = type(value)
    if kind is int:
        return value
    if kind is slice:
        ends = value.start, value.stop, value.step
        return (slice, *(ends if _PLAIN.issuperset(map(type, ends)) else map(_key, ends)))
    if isinstance(value, _SEQUENCES):
        return list if isinstance(value, list) else tuple, *map(_key, value)
    if isinstance(value, Tensor):
        raise _Unkeyed
    return kind, value


_NUMBERS = frozenset((int,))
_PLAIN = frozenset((int, type(None)))
_SEQUENCES = (tuple, list)  # a union of types is a new object in every call


class _MoveCall(NamedTuple):
    """An operation whose recipe is sought.

    Attributes:
        func: the function.
        name: its name.
        spec: how its first argument is cut.
        args: the other arguments.
        kwargs: named arguments.
        place: which of several results this is about; None if there is one.
    """

    func: Any
    name: str
    spec: Spec
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | None


def find(func: Any, name: str, spec: Spec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The recipe of an operation, or `LOST` if there is none at this or the highest degree."""
    recipe = _recipe(func, name, spec, args, kwargs)
    if recipe is LOST:
        return LOST
    for region in spec.region.finest():
        shared = spec.cut.shared
        cut = CutDim(Shared(shared.units, shared.leaves, region.axis.size), spec.cut.blocks)
        other = region.spec(tuple(spec.shape), spec.dim, cut)
        if _recipe(func, name, other, args, kwargs) is LOST:
            return LOST
    return recipe


def _recipe(func: Any, name: str, spec: Spec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Find a recipe: for each result its cut, and the call on the part that gives it."""
    with operators.unrecorded(), torch.no_grad(), torch._C.DisableTorchFunction():
        numbers = _along(torch.arange(spec.shape[spec.dim]), spec.shape, spec.dim)
        if name in _SIZED:
            shape = func(torch.empty(spec.shape, device="meta"), *args, **kwargs).shape
            out = _reshaped(numbers, tuple(shape), spec.dim)
        else:
            out = func(numbers, *args, **kwargs)
        many = None if isinstance(out, Tensor) else (tuple if isinstance(out, tuple) else list)
        outs = [out] if many is None else list(out)
        mine = _along(torch.from_numpy(spec.cut.held(spec.region.rank)), spec.local_shape, spec.dim)
        try:
            return many, [
                _result(
                    _MoveCall(func, name, spec, args, kwargs, None if many is None else place),
                    each,
                    mine,
                )
                for place, each in enumerate(outs)
            ]
        except Lost:
            return LOST


def _along(numbers: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """The numbers along one dim, expanded over all other dims without memory."""
    return numbers.reshape([-1 if each == dim else 1 for each in range(len(shape))]).expand(shape)


def _reshaped(numbers: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """`numbers.reshape(shape)`; leading and trailing dims that both shapes share are not copied."""
    old = tuple(numbers.shape)
    first = 0
    while first < min(dim, len(shape)) and old[first] == shape[first]:
        first += 1
    last = 0
    most = min(len(old) - 1 - dim, len(shape) - first)
    while last < most and old[-1 - last] == shape[-1 - last]:
        last += 1
    small = numbers
    for each in (*range(first), *range(len(old) - last, len(old))):
        small = small.narrow(each, 0, min(1, old[each]))
    inner = shape[first : len(shape) - last]
    ends = (small.shape[:first], small.shape[len(old) - last :])
    return small.reshape(*ends[0], *inner, *ends[1]).expand(shape)


def _without_repeats(x: Tensor) -> Tensor:
    """Numbers with size 1 along each dim in which they do not vary."""
    for dim in range(x.dim()):
        if x.shape[dim] > 1 and x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    if x.numel() > LARGEST:
        raise Lost
    for dim in range(x.dim()):
        if x.shape[dim] > 1:
            first = x.narrow(dim, 0, 1)
            if torch.equal(x, first.expand(x.shape)):
                x = first
    return x


def _result(call: _MoveCall, out: Tensor, mine: Tensor) -> tuple[Step, Spec | None]:
    """The recipe of one result: the call on the part, and the cut of the result."""
    spec, cut = call.spec, call.spec.cut
    if not out.numel():
        result_spec = _of_nothing(spec, out)
        return _step(call, mine, _empty(result_spec), result_spec), result_spec
    core = _without_repeats(out)
    labels = torch.from_numpy(cut.labels)[core]
    dim, units = _where_units_vary(labels, spec, call.name, tuple(out.shape))
    order = units.movedim(dim, 0)[..., None].flatten(1)[:, 0].expand(out.shape[dim])
    new = CutDim.of_labels(cut.shared, order.numpy())
    result_spec = spec.region.spec(tuple(out.shape), dim, new)
    held = torch.from_numpy(new.held(spec.region.rank))
    shape = tuple(out.shape[dim] if each == dim else n for each, n in enumerate(core.shape))
    expected = _narrowed(out, shape).index_select(dim, held)
    return _step(call, mine, expected, result_spec), result_spec


def _of_nothing(spec: Spec, out: Tensor) -> Spec:
    """How an empty view is cut, which its stride along the cut dim shows."""
    size = spec.shape[spec.dim]
    dims = [dim for dim in range(out.dim()) if out.shape[dim] == size and out.stride(dim)]
    if size < 2 or len(dims) != 1 or out.stride(dims[0]) != 1:
        raise Lost
    return spec.region.spec(tuple(out.shape), dims[0], spec.cut)


def _empty(spec: Spec) -> Tensor:
    return torch.empty(spec.local_shape, dtype=torch.int64)


def _where_units_vary(
    labels: Tensor, spec: Spec, name: str, shape: tuple[int, ...]
) -> tuple[int, Tensor]:
    """The dim along which units differ, and the unit of each of its indices."""
    units, cut = _without_repeats(labels), spec.cut
    dims = [dim for dim in range(units.dim()) if units.shape[dim] > 1]
    if len(dims) > 1 and cut.shared.units.breaks is not None:
        # A rank has all units between two breaks, so any of them tells the owner of an index.
        units = _without_repeats(torch.from_numpy(_first_of_run(cut))[labels])
        dims = [dim for dim in range(units.dim()) if units.shape[dim] > 1]
    if not dims:
        return _dim_of_one(labels, spec, name, shape), labels
    if len(dims) > 1:
        raise Lost
    return dims[0], units


def _first_of_run(cut: CutDim) -> Any:
    """For each unit, the first unit that is on the same rank at every degree.

    A shared unit that only units of one run need is on their rank; other shared units stay apart.
    """
    units = cut.shared.units
    first = np.arange(units.count + len(units.needers))
    starts = np.asarray(sorted({0, *(units.breaks or ())}))
    own = first[: units.count]
    first[: units.count] = starts[np.searchsorted(starts, own, side="right") - 1]
    for number, needers in enumerate(units.needers):
        if needers and first[needers[0]] == first[needers[-1]]:
            first[units.count + number] = first[needers[0]]
    return first


def _dim_of_one(labels: Tensor, spec: Spec, name: str, shape: tuple[int, ...]) -> int:
    """A dim that can represent the cut if all elements belong to one unit."""
    unit, cut = int(labels.flatten()[0]), spec.cut
    count = cut.shared.units.count
    if name in ("expand", "broadcast_to"):
        return spec.dim + len(shape) - len(spec.shape)
    has = count == 1 or (unit >= count and len(cut.shared.units.needers[unit - count]) == count)
    dims = [dim for dim in range(labels.dim()) if labels.shape[dim] > 1]
    dims += [dim for dim in range(len(shape)) if shape[dim] == 1]
    if not has or not dims:
        raise Lost
    return dims[0]


def _narrowed(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    for dim, size in enumerate(shape):
        if size == 1 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _step(call: _MoveCall, mine: Tensor, expected: Tensor, result_spec: Spec) -> Step:
    """The cheapest call on the part that gives the expected numbers."""
    spec, shape = call.spec, tuple(result_spec.local_shape)

    def fits(step: Step) -> bool:
        try:
            trial = step(mine)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False  # this candidate does not fit the shape of the part
        return tuple(trial.shape) == shape and torch.equal(
            _narrowed(trial, expected.shape), expected
        )

    if spec.region.scheme.is_invariant and call.name != "getitem":
        # A repeat sums in backward, so its form is called.
        call = call._replace(func=forms.form_of(call.func) or call.func)
    for candidate in _candidates(call, shape):
        if fits(candidate):
            return candidate
    for candidate in _runs(spec, expected, result_spec):
        if fits(candidate):
            return candidate
        if call.name == "getitem":
            both = _then(candidate, _with_all(call.args[0], spec))
            if fits(both):
                return both
    raise Lost


def _with_all(index: Any, spec: Spec) -> tuple[Any, ...]:
    """The index with a full slice for the cut dim."""
    entries = list(index) if isinstance(index, tuple) else [index]
    named = sum(each is not None and each is not Ellipsis for each in entries)
    at = 0
    for place, each in enumerate(entries):
        if each is None:
            continue
        if each is Ellipsis:
            at += len(spec.shape) - named
            continue
        if at == spec.dim:
            entries[place] = slice(None)
        at += 1
    return tuple(entries)


def _then(first: Step, index: tuple[Any, ...]) -> Step:
    return lambda x: first(x)[index]


def _candidates(call: _MoveCall, shape: tuple[int, ...]) -> list[Step]:
    func, name, _, args, kwargs, place = call
    if name in _SIZED:
        return [lambda x: x.reshape(shape)]
    if name in ("expand", "broadcast_to"):
        return [lambda x: func(x, shape)]
    if place is None:
        return [lambda x: func(x, *args, **kwargs)]
    return [lambda x: func(x, *args, **kwargs)[place]]


def _runs(spec: Spec, expected: Tensor, result_spec: Spec) -> list[Step]:
    """Steps that select held indices of the cut dim: slices, strides, or a list."""
    held = spec.cut.held(spec.region.rank)
    sources = expected.movedim(result_spec.dim, 0)[..., None].flatten(1)
    if sources.shape[1] != 1 and not torch.equal(sources, sources[:, :1].expand(sources.shape)):
        return []
    numbers = sources[:, 0].numpy()
    where = np.searchsorted(held, numbers)
    if len(where) and (where.max() >= len(held) or (held[where] != numbers).any()):
        return []
    dim, count = spec.dim, len(where)
    start = int(where[0]) if count else 0
    steps = np.diff(where)
    runs: list[Step] = []
    if not count or (steps == 1).all():
        runs.append(lambda x: x.narrow(dim, start, count))
    elif (steps == steps[0]).all() and steps[0] > 0:
        places = slice(start, int(where[-1]) + 1, int(steps[0]))
        index = (*(slice(None) for _ in range(dim)), places)
        runs.append(lambda x: x[index])
    index_ = torch.from_numpy(where)
    runs.append(lambda x: x.index_select(dim, index_.to(x.device)))
    return runs
