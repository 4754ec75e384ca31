"""What our autograd functions share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as _once_differentiable

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """A backward that raises when it is differentiated again, as torch's decorator of that name.

    That one switches gradients off around every call, at 2 us; where they are off already, as in
    every backward without `create_graph`, this one does not.

    Args:
        backward: of an autograd function.
    """
    guarded = _once_differentiable(backward)

    @functools.wraps(backward)
    def backward_once(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return backward_once
