"""What the cut linears do alike: rows of matrices, autocast, and one dtype and device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from shardproof import operands, operators
from shardproof.errors import ShapeError
from shardproof.operands import FLOATS, PLAIN, is_traced

_AS_IT_IS = nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """(*, n) to (rows, n). `view(-1, n)` fails for n = 0, on a rank without leaves."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def shaped(rows: Tensor | None, like: Tensor) -> Any:
    """(rows, n), a tensor of our own, to (*, n) with the leading dims of `like`.

    In place: into a view that a Function makes nobody may write. `resize_` takes memory as it lies,
    so that what was computed element by element from a transposed input is copied first.
    """
    if rows is not None and rows._is_view():  # one node of a sum may be a part of several
        rows = torch.ops.aten._unsafe_view(rows, rows.shape)
    if rows is None or like.dim() == 2:
        return rows
    if not rows.is_contiguous():
        rows = rows.contiguous()
    return operators.resized(rows, (*like.shape[:-1], rows.shape[1]))


def is_autocast(x: Tensor) -> bool:
    """Whether torch would cast the operands of a linear where `x` is."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    # There is none for meta tensors, and torch raises where it is asked.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to the operands of a linear, done where autograd sees it."""
    return x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x


def prepared(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """A context without autocast to compute in, and the operands, cast where autograd sees it.

    Args:
        first: the operand that says on which device autocast is asked for.
        others: the other operands.
    """
    if not is_autocast(first):
        return (_AS_IT_IS, first, *others)
    kind = first.device.type
    dtype = torch.get_autocast_dtype(kind)
    operands_cast = (None if each is None else cast(each, dtype) for each in (first, *others))
    return (torch.autocast(kind, enabled=False), *operands_cast)


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, for a backward whose forward has cast its operands."""
    return torch.autocast(like.device.type, enabled=False) if is_autocast(like) else _AS_IT_IS


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see what is computed from these."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:  # noqa: SIM110 - `any` of a generator is slower, in every forward
        if x is not None and x.requires_grad:
            return True
    return False


def are_alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all have the dtype and the device of `x`."""
    dtype, device = x.dtype, x.device
    return all(
        other is None or (other.dtype is dtype and other.device == device) for other in others
    )


def check_alike(x: Tensor, weight: Tensor, bias: Tensor | None, who: str) -> None:
    """Raise before anything is sent unless the operands have one dtype and one device.

    On all ranks alike: torch itself would raise on those alone that have something to multiply.

    Raises:
        ShapeError: they have not.
        UsageError: one of them is of a kind or a dtype that is not computed with.
    """
    dtype, device = x.dtype, x.device
    if (
        weight.dtype is dtype
        and weight.device == device
        and (bias is None or (bias.dtype is dtype and bias.device == device))
    ):
        if (
            type(x) not in PLAIN
            or type(weight) not in PLAIN
            or (bias is not None and type(bias) not in PLAIN)
            or dtype not in FLOATS
            or is_traced()
        ):
            operands.check(who, x=x, weight=weight, bias=bias)
            operands.check_floating(who, x=x)
        return
    operands.check(who, x=x, weight=weight, bias=bias)
    operands_by_name = {"x": x, "weight": weight, "bias": bias}
    dtypes_and_devices = ", ".join(
        f"{name} is {value.dtype} on {value.device}"
        for name, value in operands_by_name.items()
        if value is not None
    )
    raise ShapeError(
        f"{who}: {dtypes_and_devices}, and a linear takes one dtype and one device. Cast the input "
        "with x.to(layer.weight), or the layer with layer.to(x), or use torch.autocast."
    )
