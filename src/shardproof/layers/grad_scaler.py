"""Lets `torch.amp.GradScaler` skip a step on all ranks of an axis, or on none.

A scaler looks for infinities in the gradients that its rank holds. Where the optimizer has cut
parameters, an overflow may be in one rank's shard alone: that rank would skip its step and halve
its scale, and the others would not. So what was found is shared over the axes of the cut parameters
as soon as it is known, in `_unscale_grads_`, through which `unscale_` and `step` go; a subclass
that has its own shares at the latest when it decides on the step. Nothing is to be done by a user,
and optimizers without cut parameters are as before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from shardproof import comm
from shardproof.layers.function_replacement import replace
from shardproof.layers.registry import axes_of

_IS_SHARED = "found_inf_is_shared"


def install() -> None:
    """Share what every scaler finds; the second time does nothing."""
    replace(GradScaler._unscale_grads_, _unscaling)
    replace(GradScaler._maybe_opt_step, _deciding)


def _unscaling(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        flags_by_device = original(self, optimizer, *args, **kwargs)
        _share(flags_by_device, optimizer)
        self._per_optimizer_states[id(optimizer)][_IS_SHARED] = True
        return flags_by_device

    return guard


def _deciding(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(
        self: GradScaler, optimizer: Optimizer, state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not state.get(_IS_SHARED):
            _share(state["found_inf_per_device"], optimizer)
            state[_IS_SHARED] = True
        return original(self, optimizer, state, *args, **kwargs)

    return guard


@torch.no_grad()
def _share(flags_by_device: dict[torch.device, Tensor], optimizer: Optimizer) -> None:
    """Set every flag in `flags_by_device` if it is set on any rank of the axes.

    A rank without gradients takes part too: only what all ranks have alike decides who does.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for axis in axes_of(parameters):
        flags = [flag.to(parameters[0].device).reshape(()) for flag in flags_by_device.values()]
        mine = (
            torch.stack(flags).amax() if flags else parameters[0].new_zeros((), dtype=torch.float)
        )
        total = comm.all_reduce(mine, axis, direction="update", who="GradScaler")
        for flag in flags_by_device.values():
            flag.copy_(total.clamp(max=1.0).expand_as(flag))
