"""`once_differentiable`, for the backward of our autograd functions."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as _once_differentiable

from shardproof import operands
from shardproof.errors import UsageError

Backward = Callable[..., Any]


class OwnFunction(torch.autograd.Function):
    """An autograd function of this package: it never takes a cut tensor (`cut.foreign`).

    It is called as torch calls one, past what `cut.foreign` does to the functions of others.
    """

    apply: Any = classmethod(torch.autograd.Function.apply.__func__)  # type: ignore[attr-defined]


def once_differentiable(backward: Backward) -> Backward:
    """Make a backward raise when it is differentiated again, like torch's decorator of that name.

    torch's decorator disables gradients around every call, which takes 2 us. This one does so only
    if they are enabled, that is with `create_graph`. torch's decorator also drops a second-order
    term silently if no incoming gradient needs a gradient (as for a plain sum). This one raises if
    a tensor that the forward saved needs a gradient.

    Args:
        backward: the backward of an autograd function.
    """
    guarded = _once_differentiable(backward)

    @functools.wraps(backward)
    def backward_once(ctx: Any, *grads: Any) -> Any:
        for grad in grads:
            if type(grad) is not Tensor and isinstance(grad, Tensor):
                _explain(None, ctx, grads)
        try:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            return guarded(ctx, *_armed(ctx, grads))
        except operands.ERRORS as error:
            _explain(error, ctx, grads)

    return backward_once


def _explain(error: Exception | None, ctx: Any, grads: tuple[Any, ...]) -> None:
    """Raise an error that names the layer whose incoming gradient is unreadable, or `error`."""
    who = _layer_name(ctx)
    for number, grad in enumerate(grads):
        if isinstance(grad, Tensor):
            name = "grad" if len(grads) == 1 else f"grads[{number}]"
            try:
                operands.check(f"backward of {who}", **{name: grad})
            except UsageError as refusal:
                raise refusal from error
    if error is not None:
        raise error


def _layer_name(ctx: Any) -> str:
    """The name of the layer in what the forward kept; without one, that of the function."""
    for attribute in ("split", "shared", "place"):
        argument = getattr(ctx, attribute, None)
        name = getattr(argument, "name", "") or getattr(argument, "who", "")
        if name:
            return str(name)
    return type(ctx).__name__.strip("_")


def _armed(ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients; one needs a gradient if it, or a saved tensor, needs one."""
    tensors = [grad for grad in grads if isinstance(grad, Tensor)]
    if any(grad.requires_grad for grad in tensors) or not tensors:
        return grads
    if not any(saved is not None and saved.requires_grad for saved in ctx.saved_tensors):
        return grads
    place = next(place for place, grad in enumerate(grads) if isinstance(grad, Tensor))
    return (*grads[:place], grads[place].detach().requires_grad_(), *grads[place + 1 :])
