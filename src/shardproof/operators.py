"""Our kernels and collectives as custom operators of torch, for tracers.

`torch.compile`, `torch.export`, `make_fx`, FakeTensorMode and FLOP counters see only operators of
torch. While one of them is active, our C kernels and our collectives are called as
`torch.ops.shardproof`, each with a fake kernel that gives the shape of its result. Otherwise they
are called directly, which is faster. Our own observers get them from `observing.py`.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.effects import EffectType
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import _register_effectful_op
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from shardproof.errors import UsageError
from shardproof.observing import Observer
from shardproof.operands import PLAIN

Collective = Callable[[list[Tensor], Any], list[Tensor]]  # of its parts and the axis

_library = torch.library.Library("shardproof", "FRAGMENT")
_num_modes = torch._C._len_torch_dispatch_stack
_PLAIN_OR_NONE = PLAIN | {type(None)}


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether to call the operators: a tracer is active, or an operand has no memory."""
    if _num_modes() and not all(
        isinstance(mode, Observer) for mode in _get_current_dispatch_mode_stack()
    ):
        return True
    for x in tensors:  # a plain loop, because this runs before every kernel
        if type(x) not in _PLAIN_OR_NONE and isinstance(x, FakeTensor | FunctionalTensor):
            return True
    return False


# A context without tracing, for creating constant tensors that are cached.
unrecorded = _disable_current_modes


def constant(x: Tensor) -> Tensor:
    """A cached tensor for an operation; while a tracer is active, a copy of it.

    Args:
        x: a tensor that was created inside `unrecorded()`.
    """
    if is_recorded():
        copy: Tensor = torch.ops.aten.lift_fresh_copy.default(x)
        return copy
    return x


def resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Give a tensor of ours another shape; the result is not a view, so a caller may write to it.

    Args:
        x: contiguous; it must not be used afterwards.
        shape: a shape with as many elements.
    """
    if is_recorded(x):
        result: Tensor = torch.ops.aten._unsafe_view.default(x, list(shape))
        return result
    return x.resize_(shape)


def define(
    schema: str,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    *,
    is_ordered: bool = False,
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator of torch.

    Args:
        schema: name, arguments and results, as `torch.library` writes them.
        fake: function that returns results of the right shapes, on tensors without memory.
        flops: function that returns the flops of a call, from its arguments and `out_val`; None
            for an operator that computes nothing.
        is_ordered: whether graphs must keep all calls in their order, because every rank must make
            the same collectives.

    Returns:
        A decorator that returns the operator.
    """

    def put(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"shardproof::{name}", fake, lib=_library)
        if is_ordered:
            _register_effectful_op(f"shardproof::{name}", EffectType.ORDERED)
        operator = getattr(torch.ops.shardproof, name)
        if flops is not None:
            register_flop_formula(operator, get_raw=True)(flops)
        return operator.default

    return put


class Numbered:
    """Numbers objects, so that a graph can refer to them while they exist."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._numbers: Any = WeakIdKeyDictionary()  # by identity: two axes may be equal
        self._objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def number(self, x: Any) -> int:
        """The number of an object, always the same and never reused."""
        number = self._numbers.get(x)
        if number is None:
            number = self._numbers[x] = next(self._count)
            self._objects[number] = x
        return number

    def get(self, number: int) -> Any:
        """The object with a number; None if it no longer exists, or is in another process."""
        return self._objects.get(number)


_axes = Numbered()
_collectives_by_axis: Any = (
    WeakIdKeyDictionary()
)  # axis -> the collectives that were recorded for it


def record(
    kind: str,
    parts: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    like: Tensor,
    axis: Any,
    collective: Collective,
) -> list[Tensor]:
    """Call a collective as an operator.

    Args:
        kind: "all_gather", "all_reduce", "reduce_scatter" or "exchange".
        parts: the tensors that this rank sends.
        shapes: shapes of the results on this rank.
        like: any tensor with the results' dtype and device.
        axis: the ranks of the collective.
        collective: function that is called with the parts and the axis if the parts have memory.
            It must not write into them, and must not keep the axis or a tensor.

    Returns:
        The results.

    Comm:
        that of `collective`.
    """
    calls = _collectives_by_axis.setdefault(axis, [])
    calls.append(collective)
    sizes = [size for shape in shapes for size in shape]
    dims = [len(shape) for shape in shapes]
    place = (_axes.number(axis), len(calls) - 1)
    results: list[Tensor] = _COLLECTIVES[kind](
        list(parts), sizes, dims, like.dtype, like.device, *place
    )
    if not _is_written(like, *parts):
        calls.pop()  # it runs now and never again
    return results


def _is_written(*tensors: Tensor) -> bool:
    """Whether a graph is recorded, which will call the collective again."""
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxy is not None or any(type(x) not in PLAIN for x in tensors)


def _collective(parts: list[Tensor], *how: Any) -> list[Tensor]:
    *_, number, call = how
    axis = _axes.get(number)
    calls = [] if axis is None else _collectives_by_axis.get(axis, [])
    if call >= len(calls):
        raise UsageError(
            "a recorded program calls a collective of ranks that are not there: it was recorded "
            "in another process, or its axis is gone. Record it again on these ranks."
        )
    return calls[call](parts, axis)


def _shapes(
    parts: list[Tensor],
    sizes: list[int],
    dims: list[int],
    dtype: torch.dtype,
    device: torch.device,
    *_: int,
) -> list[Tensor]:
    starts = itertools.accumulate(dims, initial=0)
    return [
        torch.empty(sizes[start : start + length], dtype=dtype, device=device)
        for start, length in zip(starts, dims, strict=False)
    ]


_COLLECTIVES = {
    kind: define(
        f"{kind}(Tensor[] parts, SymInt[] sizes, int[] dims, ScalarType dtype, Device device, "
        "int axis, int call) -> Tensor[]",
        _shapes,
        is_ordered=True,
    )(_collective)
    for kind in ("all_gather", "all_reduce", "reduce_scatter", "exchange")
}
