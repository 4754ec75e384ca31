"""Our kernels and collectives as operators of torch, for those who record what is computed.

`torch.compile`, `torch.export`, `make_fx`, FakeTensorMode and FLOP counters see operators of torch
alone. While one of them is at work, our kernels in C and our exchanges are called as
`torch.ops.shardproof`, each with a fake kernel that gives the shape of its result. Otherwise they
are called directly, which is faster. Our own observers are told of them (`observing.py`).
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
_KNOWN = PLAIN | {type(None)}


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether operators are to be called: something records them, or an operand has no memory."""
    if _num_modes() and not all(
        isinstance(mode, Observer) for mode in _get_current_dispatch_mode_stack()
    ):
        return True
    for x in tensors:  # a loop: this is asked before every kernel
        if type(x) not in _KNOWN and isinstance(x, FakeTensor | FunctionalTensor):
            return True
    return False


# A context in which nothing records: for making tensors that do not depend on data, and are kept.
unrecorded = _disable_current_modes


def constant(x: Tensor) -> Tensor:
    """A tensor that was kept, as an operation takes it now; a recording gets a copy of its own.

    Args:
        x: made inside `unrecorded()`.
    """
    if is_recorded():
        recorded: Tensor = torch.ops.aten.lift_fresh_copy.default(x)
        return recorded
    return x


def resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of our own in another shape; no view, so that a caller may write to it.

    Args:
        x: contiguous; it is given away.
        shape: of as many elements.
    """
    if is_recorded(x):
        recorded: Tensor = torch.ops.aten._unsafe_view.default(x, list(shape))
        return recorded
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
        fake: the shapes of the results, on tensors without memory.
        flops: of a call, from its arguments and `out_val`; None: it computes nothing.
        is_ordered: graphs keep all calls of such operators, in their order: every rank must meet
            the others in the same collectives.

    Returns:
        A decorator, which gives the operator.
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
    """Gives objects numbers, by which a graph refers to them as long as they live."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._numbers: Any = WeakIdKeyDictionary()  # two axes may be equal
        self._objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def number(self, x: Any) -> int:
        """Of an object; the same every time, and never that of another."""
        number = self._numbers.get(x)
        if number is None:
            number = self._numbers[x] = next(self._count)
            self._objects[number] = x
        return number

    def get(self, number: int) -> Any:
        """The object; None if it is gone, or of another process."""
        return self._objects.get(number)


_axes = Numbered()
_kept: Any = WeakIdKeyDictionary()  # axis -> the collectives that were recorded for it


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
        parts: what this rank sends.
        shapes: of the results on this rank.
        like: any tensor of the results' dtype and device.
        axis: the ranks.
        collective: what is called with the parts and the axis where the parts have memory; it
            must not write into them, nor refer to the axis or to a tensor of now.

    Returns:
        The results.

    Comm:
        that of `collective`.
    """
    kept = _kept.setdefault(axis, [])
    kept.append(collective)
    sizes = [size for shape in shapes for size in shape]
    dims = [len(shape) for shape in shapes]
    place = (_axes.number(axis), len(kept) - 1)
    results: list[Tensor] = _COLLECTIVES[kind](
        list(parts), sizes, dims, like.dtype, like.device, *place
    )
    if not _is_written(like, *parts):
        kept.pop()  # it was called now, and never will be again
    return results


def _is_written(*tensors: Tensor) -> bool:
    """Whether there is a graph, which calls again."""
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxy is not None or any(type(x) not in PLAIN for x in tensors)


def _collective(parts: list[Tensor], *how: Any) -> list[Tensor]:
    *_, number, call = how
    axis = _axes.get(number)
    kept = [] if axis is None else _kept.get(axis, [])
    if call >= len(kept):
        raise UsageError(
            "a recorded program calls a collective of ranks that are not there: it was recorded "
            "in another process, or its axis is gone. Record it again on these ranks."
        )
    return kept[call](parts, axis)


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
