"""Operations without a rule: decomposed into simpler operations if possible, else gathered.

A function of torch that is written in Python runs again, so that its operations are dispatched one
by one. A C++ operation that is composed of others sends each ATen operation back here. All other
operations run on gathered tensors, which is correct, and are counted for the plan.
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
from shardproof.cut.tensor import RULES, CutTensor, composed, rule, run, with_dispatch
from shardproof.errors import UsageError
from shardproof.numerics import forms
from shardproof.ops import unit_ops

_OVERRIDE_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")

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
# Operations that read the values themselves.
_READS_VALUES = frozenset(
    """whole numpy tolist item __reduce_ex__ __array__ __contains__ __bool__ bool_ __float__ __int__
    __index__ __complex__ data_ptr untyped_storage storage __dlpack__ __dlpack_device__ allclose
    equal is_nonzero""".split()  # noqa: SIM905
)


def is_cut(x: Any) -> bool:
    """Whether it is a cut tensor: `isinstance` for `tree_map`."""
    return isinstance(x, CutTensor)


def whole(x: CutTensor, why: str) -> Tensor:
    """Gather a cut tensor on every rank; counted under `why`.

    Raises:
        UsageError: `x` is a cut weight of two dims or more, and this is not a rehearsal.
    """
    region = x.spec.region
    keep_weight(x, why)
    region.count_gathered(why, x.who)
    return unit_ops.gather(x.local, x.spec.dim, region.place(x.spec.cut, x.who))


def keep_weight(x: CutTensor, why: str) -> None:
    """Refuse to gather a cut weight; in a rehearsal, note that the weight must stay whole.

    In a model that was cut by watching, code outside of the forward may read the values of a
    weight, for instance with `numpy()`.

    Args:
        x: the tensor that is about to be gathered.
        why: the operation that needs all of it.

    Raises:
        UsageError: `x` is a cut weight of two dims or more, or a view of one, and this is not a
            rehearsal.
    """
    region = x.spec.region
    weight = region.weight_of(x.local)
    if weight is None:
        return
    if region.is_rehearsed:
        region.whole_weights.setdefault(weight, _as_written(why))
        return
    if why in _READS_VALUES and not region.are_weights_cut_only_in_forward:
        return  # the forward of a watched plan needs no such weight, so this is other code
    raise UsageError(would_be_whole(_as_written(why), weight))


def would_be_whole(operation: str, weight: str) -> str:
    """The message for an operation that needs all of a cut weight.

    Args:
        operation: the operation that has no rule for cut tensors.
        weight: name of the parameter.
    """
    return (
        f"{weight!r} would be whole on every rank: the model needs all of it ({operation}), and "
        "that cannot be done on parts. Leave the weight whole (no entry in the plan), or write "
        "it with operations that have a form for parts."
    )


def _as_written(name: str) -> str:
    """The operation that the model's code calls, which may be composed of `name` and others."""
    outers: list[_Outer] = _local.__dict__.get("outers", [])
    return outers[0].name if outers else name


@rule("whole")
def _whole_rule(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`x.whole()`: gather the tensor."""
    return whole(args[0], name)


def invariant(region: Region, func: Any, who: str) -> Callable[..., Any]:
    """The invariant form of an operation; the operation itself if numerics are native.

    An operation without an invariant form is noted in the region, so that the plan can report it.
    """
    function = region.forms.get(func)
    if function is None:
        form = forms.form_of(func) if region.scheme.is_invariant else func
        name = getattr(func, "__name__", str(func))
        if form is None and not forms.holds(func) and name not in _NEEDS_NO_FORM:
            region.variant.setdefault(name, who)
        function = region.forms[func] = func if form is None else form
    return function


def computed(region: Region, func: Any, *args: Any) -> Any:
    """Run an operation inside a rule: by its rule if an operand is cut, else by its form."""
    if any(isinstance(each, CutTensor) for each in args):
        return run(func, args, {})
    return invariant(region, func, "")(*args)


@rule(
    "gathered",
    "multinomial",
    "nonzero",
    "unique",
    "bincount",
    "histc",
    "isin",
    *(_READS_VALUES - {"whole"}),
)
def gathered(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on gathered tensors; in-place writes are copied back into the parts."""
    return on_opened(func, name, args, kwargs, is_cut)


def on_opened(
    func: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_opened: Callable[[Any], bool],
) -> Any:
    """Run an operation after some operands were gathered; in-place writes are copied back.

    Args:
        func: what is called.
        name: of the operation, for the plan.
        args: in order.
        kwargs: by name.
        is_opened: whether a value is a cut tensor that is gathered.
    """
    back: list[tuple[CutTensor, Tensor]] = []

    def open_(x: Any) -> Any:
        if not is_opened(x):
            return x
        data = whole(x, name)
        back.append((x, data))
        return data

    whole_args, options = tree_map(open_, (args, kwargs), is_leaf=is_cut)
    versions = [data._version for _, data in back]
    y = func(*whole_args, **options)
    cut_by_data = {}
    for (x, data), version in zip(back, versions, strict=True):
        if data._version != version:
            place = x.spec.region.place(x.spec.cut, x.who)
            x.local.copy_(unit_ops.take(data, x.spec.dim, place))
        cut_by_data[id(data)] = x
    return tree_map(lambda each: cut_by_data.get(id(each), each), y, is_leaf=is_cut)


@cache
def unwrapped(func: FunctionType) -> Callable[..., Any]:
    """A Python function of torch without its check for `__torch_function__`."""
    blind = dict.fromkeys(_OVERRIDE_CHECKS, lambda *_: False)
    function = FunctionType(
        func.__code__,
        {**func.__globals__, **blind},
        func.__name__,
        func.__defaults__,
        None if func.__closure__ is None else tuple(map(_unwrapped_cell, func.__closure__)),
    )
    function.__kwdefaults__ = func.__kwdefaults__
    return function


def _unwrapped_cell(cell: CellType) -> CellType:
    """Unwrap functions in a closure, such as the two that `F.max_pool2d` chooses between."""
    content = cell.cell_contents
    is_theirs = isinstance(content, FunctionType) and content.__module__.startswith("torch")
    return CellType(unwrapped(content)) if is_theirs else cell


@rule("others")
def run_without_rule(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The rule of every operation that has none of its own."""
    if isinstance(func, FunctionType) and func.__module__.startswith("torch"):
        return unwrapped(func)(*args, **kwargs)
    if RULES.get(name) is None and name.endswith("_") and name[:-1] in RULES:
        return _written(func, name, args, kwargs)
    if isinstance(func, OpOverload) or not _is_composed(name):
        return gathered(func, name, args, kwargs)
    return _decomposed(func, name, args, kwargs)


@cache
def _is_composed(name: str) -> bool:
    """Whether ATen has a composite operation of that name."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch._C._dispatch_has_kernel_for_dispatch_key(
            f"aten::{name}.{overload}".removesuffix(".default"), "CompositeImplicitAutograd"
        )
        for overload in packet.overloads()
    )


def _written(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an in-place operation by the rule of its out-of-place version."""
    x = args[0]
    y = RULES[name[:-1]](getattr(Tensor, name[:-1]), name[:-1], args, kwargs)
    return RULES["copy_"](Tensor.copy_, "copy_", (x, y), {}) if y is not x else x


class _Outer:
    """The state of dispatch and autograd outside of a composite operation."""

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


def _decomposed(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a composite C++ operation on cut tensors; its ATen operations arrive in `_of_aten`.

    Inside, autograd is off for ATen operations that have no cut operand. So if a whole tensor that
    needs a gradient is an operand, or becomes one on the way, everything is gathered instead.
    """
    args, kwargs = tree_map(with_dispatch, (args, kwargs), is_leaf=is_cut)
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
    """A whole tensor that needs a gradient came up inside a composite operation."""


def _wants(x: Any) -> bool:
    return isinstance(x, Tensor) and not is_cut(x) and x.requires_grad


def _of_aten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation on cut tensors, with dispatch and autograd as they were outside.

    Raises:
        UsageError: it does not come from an operation that is decomposed here, so that the
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
