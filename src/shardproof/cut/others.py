"""Operations without a rule: taken apart where they are made of others, gathered where not.

A function of torch that is written in Python is run again with its own operations seen; one of
C++ that is composed of others brings each ATen operation back here. What is left is computed on
whole tensors: right, and counted, so that the plan can say what is gathered.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten, tree_map

from shardproof.cut.spec import Region
from shardproof.cut.tensor import RULES, CutTensor, composed, rule, run, shown
from shardproof.errors import UsageError
from shardproof.numerics import forms
from shardproof.ops import unit_ops

_SEEN = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")

_NEEDS_NO_FORM = frozenset(
    """new_empty new_zeros new_ones new_full new_tensor zero_ fill_ empty_like zeros_like ones_like
    full_like empty zeros ones full arange tensor as_tensor from_numpy copy_ clone detach
    numpy item tolist data_ptr index_copy_ index_copy scatter_ scatter masked_fill_
    masked_scatter_ nonzero bool int long short byte char greater greater_equal less
    less_equal not_equal __iand__ __ior__ __ixor__ index_add_ scatter_add_ view_as_complex
    view_as_real bincount eye linspace cpu cuda is_nonzero equal allclose isin
    broadcast_tensors __setitem__ __contains__ __bool__ __int__ __float__ __index__ __len__
    __get__ __set__ size stride dim numel element_size is_contiguous is_floating_point
    is_complex""".split()  # noqa: SIM905
)
# What asks for the values themselves.
_ASKING = frozenset(
    """whole numpy tolist item __reduce_ex__ __array__ __contains__ __bool__ bool_ __float__ __int__
    __index__ __complex__ data_ptr untyped_storage storage __dlpack__ __dlpack_device__ allclose
    equal is_nonzero""".split()  # noqa: SIM905
)


def is_cut(x: Any) -> bool:
    """Whether it is a cut tensor: `isinstance` for `tree_map`."""
    return isinstance(x, CutTensor)


def whole(x: CutTensor, why: str) -> Tensor:
    """All of it, on every rank; counted under `why`.

    Raises:
        UsageError: it is a cut weight of two dims or more, and no plan is made.
    """
    region = x.spec.region
    keep_weight(x, why)
    region.count_gathered(why, x.who)
    return unit_ops.gather(x.local, x.spec.dim, region.place(x.spec.cut, x.who))


def keep_weight(x: CutTensor, why: str) -> None:
    """Refuse to make a weight whole. While a plan is made, note that the weight must stay whole.

    In a model that is cut by watching, code may read the values of a weight, for instance with
    `numpy()`: no such code is in the forward.

    Args:
        x: the tensor that is about to be gathered.
        why: the operation that needs all of it.

    Raises:
        UsageError: it is a cut weight of two dims or more, or a view of one, and no plan is made.
    """
    region = x.spec.region
    weight = region.weight_of(x.local)
    if weight is None:
        return
    if region.is_rehearsed:
        region.wanted_whole.setdefault(weight, _as_written(why))
        return
    if why in _ASKING and not region.are_weights_cut_only_in_forward:
        return  # a plan found by watching has no such weight in its forward
    raise UsageError(would_be_whole(_as_written(why), weight))


def would_be_whole(operation: str, weight: str) -> str:
    """The message for an operation that needs all of a cut weight.

    Args:
        operation: that cannot be done on parts.
        weight: name of the parameter.
    """
    return (
        f"{weight!r} would be whole on every rank: the model needs all of it ({operation}), and "
        "that cannot be done on parts. Leave the weight whole (no entry in the plan), or write "
        "it with operations that have a form for parts."
    )


def _as_written(name: str) -> str:
    """The operation that the model's code calls, of which `name` may be a part."""
    outers: list[_Outer] = _local.__dict__.get("outers", [])
    return outers[0].name if outers else name


@rule("whole")
def _asked(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The whole of one tensor, because somebody wants it."""
    return whole(args[0], name)


def invariant(region: Region, func: Any, who: str) -> Callable[..., Any]:
    """The form of an operation whose bits no cut changes; itself if numerics are native.

    One that has none is noted in the region: the plan says so before anything runs.
    """
    found = region.forms.get(func)
    if found is None:
        form = forms.form_of(func) if region.scheme.is_invariant else func
        name = getattr(func, "__name__", str(func))
        if form is None and not forms.holds(func) and name not in _NEEDS_NO_FORM:
            region.variant.setdefault(name, who)
        found = region.forms[func] = func if form is None else form
    return found


def computed(region: Region, func: Any, *args: Any) -> Any:
    """An operation inside a rule: by its own rule if an operand is cut, else by its form."""
    if any(isinstance(each, CutTensor) for each in args):
        return run(func, args, {})
    return invariant(region, func, "")(*args)


@rule("gathered", "multinomial", "nonzero", "unique", "bincount", "histc", *(_ASKING - {"whole"}))
def gathered(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On whole tensors. What was written to a whole of a cut tensor is taken back into the part."""
    back: list[tuple[CutTensor, Tensor]] = []

    def open_(x: Any) -> Any:
        if not isinstance(x, CutTensor):
            return x
        data = whole(x, name)
        back.append((x, data))
        return data

    given, options = tree_map(open_, (args, kwargs), is_leaf=is_cut)
    versions = [data._version for _, data in back]
    y = func(*given, **options)
    known = {}
    for (x, data), version in zip(back, versions, strict=True):
        if data._version != version:
            place = x.spec.region.place(x.spec.cut, x.who)
            x.local.copy_(unit_ops.take(data, x.spec.dim, place))
        known[id(data)] = x
    return tree_map(lambda each: known.get(id(each), each), y)


@cache
def unwrapped(func: FunctionType) -> Callable[..., Any]:
    """A function of torch without its question whether somebody else wants to answer."""
    blind = dict.fromkeys(_SEEN, lambda *_: False)
    made = FunctionType(
        func.__code__,
        {**func.__globals__, **blind},
        func.__name__,
        func.__defaults__,
        None if func.__closure__ is None else tuple(map(_unwrapped_cell, func.__closure__)),
    )
    made.__kwdefaults__ = func.__kwdefaults__
    return made


def _unwrapped_cell(cell: CellType) -> CellType:
    """A function that chooses between two (`F.max_pool2d`) keeps them in its closure: both ask."""
    held = cell.cell_contents
    is_theirs = isinstance(held, FunctionType) and held.__module__.startswith("torch")
    return CellType(unwrapped(held)) if is_theirs else cell


@rule("others")
def others(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Whatever has no rule."""
    if isinstance(func, FunctionType) and func.__module__.startswith("torch"):
        return unwrapped(func)(*args, **kwargs)
    if RULES.get(name) is None and name.endswith("_") and name[:-1] in RULES:
        return _written(func, name, args, kwargs)
    if isinstance(func, OpOverload) or not _is_composed(name):
        return gathered(func, name, args, kwargs)
    return _taken_apart(func, name, args, kwargs)


@cache
def _is_composed(name: str) -> bool:
    """Whether ATen has an operation of that name that is made of others."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch._C._dispatch_has_kernel_for_dispatch_key(
            f"aten::{name}.{overload}".removesuffix(".default"), "CompositeImplicitAutograd"
        )
        for overload in packet.overloads()
    )


def _written(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation in place that has a rule out of place."""
    x = args[0]
    y = RULES[name[:-1]](getattr(Tensor, name[:-1]), name[:-1], args, kwargs)
    return RULES["copy_"](Tensor.copy_, "copy_", (x, y), {}) if y is not x else x


class _Outer:
    """The state of dispatch and autograd outside a composed operation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._keys = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )
        self._grad = torch.is_grad_enabled()
        self._left: list[Any] = []

    def __enter__(self) -> None:
        guard = torch._C._ForceDispatchKeyGuard(*self._keys)
        guard.__enter__()
        self._left.append((guard, torch.is_grad_enabled()))
        torch._C._set_grad_enabled(self._grad)

    def __exit__(self, *error: object) -> None:
        guard, grad = self._left.pop()
        torch._C._set_grad_enabled(grad)
        guard.__exit__(*error)


_local = threading.local()


def _taken_apart(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation of C++ on cut tensors: what it is made of comes back by `_of_aten`.

    Inside, autograd is off for what does not come back. So a whole tensor that wants a gradient may
    not be among its operands, nor become one on the way: then all is gathered.
    """
    args, kwargs = tree_map(shown, (args, kwargs), is_leaf=is_cut)
    flat = tree_flatten((args, kwargs), is_leaf=is_cut)[0]
    if torch.is_grad_enabled() and any(_wants(each) for each in flat):
        return gathered(func, name, args, kwargs)
    outers: list[_Outer] = _local.__dict__.setdefault("outers", [])
    outers.append(_Outer(name))
    try:
        with suppress(_Whole), torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            return func(*args, **kwargs)
    finally:
        outers.pop()
    return gathered(func, name, args, kwargs)


class _Whole(Exception):  # noqa: N818 - it never leaves this file
    """Something whole that wants a gradient came up inside a composed operation."""


def _wants(x: Any) -> bool:
    return isinstance(x, Tensor) and not is_cut(x) and x.requires_grad


def _of_aten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An ATen operation on cut tensors, under dispatch and autograd as they were outside.

    Raises:
        UsageError: it does not come from an operation that is taken apart here, so that the
            gradient would be lost.
    """
    outers: list[_Outer] = _local.__dict__.setdefault("outers", [])
    if not outers and torch.is_grad_enabled():
        cut = [each for each in tree_flatten((args, kwargs), is_leaf=is_cut)[0] if is_cut(each)]
        if any(each.local.requires_grad for each in cut):
            raise UsageError(
                f"{func} gets a cut tensor past torch's Python functions, as from torch.vmap, "
                "torch.func or code in C++, where autograd does not see that it is one: its "
                "gradient would be lost. Write the operation without them, or give them x.whole()."
            )
    with outers[-1] if outers else _Outer(str(func)):
        y = run(func, args, kwargs)
    if outers and any(_wants(each) for each in tree_flatten(y, is_leaf=is_cut)[0]):
        raise _Whole
    return y


composed.append(_of_aten)
