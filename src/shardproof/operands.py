"""Check that operands have plain memory and a floating-point dtype, before C code reads them.

The C code gets an address, sizes and strides. A DTensor, a sparse tensor, or a tensor whose storage
FSDP has freed has no memory that it could read. `torch.jit.trace` and forward-mode derivatives do
not see our code. All of these are refused here: `check` runs at the start of a layer or function,
and each call of C refuses null addresses (in C itself) and freed memory. Fake and functional
tensors are allowed: for these, and while operators are recorded, C is not called (`operators.py`).
"""

from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from shardproof.errors import UsageError

# Other types are checked further; `type(x) in PLAIN` is almost free.
PLAIN = frozenset((Tensor, nn.Parameter))
FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Errors of torch or C for a tensor without memory, which are replaced by ours here.
ERRORS = (RuntimeError, BufferError, UsageError)

_is_tracing = torch._C._is_tracing
_has_transforms = torch._C._are_functorch_transforms_active


def meets_cut(rule: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Let a function accept cut tensors (`cut/`): if its first argument is one, a rule runs.

    Args:
        rule: name of the rule, which receives the undecorated function.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if type(first) not in PLAIN and (by := getattr(type(first), "by_rule", None)):
                rule_result: Result = by(rule, function, args, kwargs)
                return rule_result
            return function(*args, **kwargs)

        return call

    return decorate


def is_traced() -> bool:
    """Whether torch.jit.trace or forward-mode derivatives are active, which cannot see our code."""
    return forward_ad._current_level >= 0 or _is_tracing()


def is_odd(x: Tensor) -> bool:
    """Whether `check` might refuse `x`; cheap."""
    return type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested or _has_transforms()


def check(who: str, **operands: Tensor | None) -> None:
    """Raise unless the C code can read all operands, and no tracer records operations.

    Args:
        who: name of the layer or function, for the message.
        operands: the operands by the names that the user knows; None for a missing one.
    Raises:
        UsageError: an operand cannot be read, or a tracer is active.
    """
    _check_recording(who)
    for name, x in operands.items():
        trouble = None if x is None else _trouble(x)
        if trouble is not None:
            what, way_out = trouble
            raise UsageError(f"{who}: {name} is {what}. {way_out.format(x=name)}")


def explain(error: Exception, who: str, **operands: Tensor | None) -> NoReturn:
    """Raise the error of `check`, if there is one, or else `error`."""
    try:
        check(who, **operands)
    except UsageError as refusal:
        raise refusal from error
    raise error


def check_freed(who: str, **operands: Tensor) -> None:
    """Raise if the storage of an operand was freed, which its address may not show.

    Args:
        who: name of the function, for the message.
        operands: the operands by their names.
    Raises:
        UsageError: the memory of an operand was freed.
    """
    for x in operands.values():
        if x.storage_offset() and not x.untyped_storage().nbytes():
            check(who, **operands)


def check_floating(who: str, **operands: Tensor | None) -> None:
    """Raise unless all operands have a dtype for sums and products.

    Args:
        who: name of the layer or function, for the message.
        operands: the operands by the names that the user knows.
    Raises:
        UsageError: a dtype is complex, integer, bool, or of 8 bits.
    """
    for name, x in operands.items():
        if x is not None and x.dtype not in FLOATS:
            raise UsageError(
                f"{who}: {name} is {x.dtype}, and float32, float64, bfloat16 or float16 is wanted. "
                f"Use {name}.float()"
                + (f", or torch.view_as_real({name})." if x.dtype.is_complex else ".")
            )


def check_float(x: Tensor, who: str, name: str = "x") -> None:
    """Raise unless `x` has plain memory and a dtype for sums and products; cheap.

    Args:
        x: the operand.
        who: name of the layer or function, for the message.
        name: name of `x` that the user knows.
    Raises:
        UsageError: it does not, or a tracer is active.
    """
    if is_odd(x) or is_traced() or x.dtype not in FLOATS:
        check(who, **{name: x})
        check_floating(who, **{name: x})


def check_sent(x: Tensor, call: object) -> None:
    """Raise unless `x` has memory that other ranks can read, and no tracer is active.

    Args:
        x: the tensor that a collective sends.
        call: the collective, for the message.
    Raises:
        UsageError: it has no such memory, or a tracer is active.
    """
    if is_odd(x) or is_traced() or x.storage_offset():
        check(str(call), x=x)


def lies_flat(x: Tensor) -> bool:
    """Whether `as_flat` is a view of `x`."""
    return x.is_contiguous() and not (x.is_neg() or x.is_conj())


def as_flat(x: Tensor, call: object) -> Tensor:
    """The elements as one contiguous row, which other ranks can read.

    Args:
        x: (*), on this rank.
        call: the collective that sends it, for messages.
    Returns:
        (elements,), contiguous; a view of `x` if possible.
    Raises:
        UsageError: `x` has no memory that other ranks can read.
    """
    check_sent(x, call)
    if x.is_neg() or x.is_conj():  # a view whose memory has the opposite sign
        x = x.resolve_conj().resolve_neg()
    return x.contiguous().view(-1)


def _check_recording(who: str) -> None:
    """Raise if a program is recorded in which our operations would be missing."""
    if _is_tracing():
        raise UsageError(
            f"{who} is called under torch.jit.trace, which records torch's operations and would "
            "miss ours: the recorded program would return memory that nobody has written. Use "
            "torch.compile or torch.export."
        )


def _trouble(x: Tensor) -> tuple[str, str] | None:
    """Why `x` cannot be read, and what to do, with `{x}` for its name; or None."""
    kind = type(x)
    if not isinstance(x, Tensor):
        return None
    if hasattr(kind, "full_tensor") and hasattr(kind, "to_local"):
        return (
            f"a {kind.__name__}, of which this rank has a part",
            "Use {x}.full_tensor(), or {x}.to_local() if what this rank has is meant.",
        )
    if kind.__name__ in ("FakeTensor", "FunctionalTensor"):  # for these, `operators` are called
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x):
        return (
            "inside a transform of torch.func (vmap, grad, jvp, functionalize), which our "
            "operations have no rules for",
            "Call it outside: with a batch dim in place of vmap, and torch.autograd.grad in place "
            "of grad.",
        )
    return _trouble_of_layout(x) or _trouble_of_memory(x)


def _trouble_of_layout(x: Tensor) -> tuple[str, str] | None:
    if x.is_nested:
        return "a nested tensor", "Use {x}.to_padded_tensor(0.0)."
    if x.layout is not torch.strided:
        name = str(x.layout).removeprefix("torch._").removeprefix("torch.")
        return f"a tensor of layout {name}", "Use {x}.to_dense()."
    if x.is_quantized:
        return f"quantized ({x.dtype})", "Use {x}.dequantize()."
    kind = type(x)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return (
            f"a {kind.__name__}, a subclass of Tensor that computes in its own way "
            "(__torch_dispatch__)",
            "Convert {x} to a plain tensor first.",
        )
    return None


def _trouble_of_memory(x: Tensor) -> tuple[str, str] | None:
    if x.is_meta or not x.numel():
        return None
    if x._is_zerotensor():
        return "a tensor of zeros that has no memory", "Use {x}.clone()."
    last = x.storage_offset() + sum(
        (size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)
    )
    needed_bytes, storage_bytes = (last + 1) * x.element_size(), x.untyped_storage().nbytes()
    if storage_bytes < needed_bytes:
        return (
            f"a view of freed memory: its storage has {storage_bytes} bytes, and shape "
            f"{tuple(x.shape)} needs {needed_bytes}",
            "FSDP frees parameters between their uses: use {x} inside the forward of its module, "
            "or after module.unshard().",
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return (
            "a dual number of torch.autograd.forward_ad, whose derivative our operations would "
            "lose",
            "Use torch.autograd.grad or backward() instead.",
        )
    return None
