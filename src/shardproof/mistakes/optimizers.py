"""The optimizers of the trainings in which mistakes are made."""

from typing import Any

import torch
from torch import Tensor

from shardproof import comm
from shardproof.axis import Axis
from shardproof.layers.step_guard import declare_elementwise
from shardproof.leaves import Cut


@declare_elementwise
class ResumedSgd(torch.optim.SGD):
    """Momentum that is saved whole after every step, and read again by each rank."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, then the checkpoint."""
        answer = super().step(closure)
        for parameter, state in self.state.items():
            if hasattr(parameter, "place"):
                read_state(state["momentum_buffer"], *parameter.place)
        return answer


def resumed_sgd(parameters: Any) -> torch.optim.Optimizer:
    """Gradient descent with momentum that is saved and read again."""
    return ResumedSgd(parameters, lr=0.02, momentum=0.8)


def read_state(buffer: Tensor, axis: Axis, cut: Cut) -> None:
    """Save the buffers of all ranks as one tensor, and read this rank's part of it."""
    saved = comm.all_gather(buffer, axis, dim=0, cut=cut, direction="update")
    owned = cut.owned(axis.rank)
    buffer.copy_(saved[owned.start : owned.stop])


def calm_sgd(parameters: Any) -> torch.optim.Optimizer:
    """For layers behind each other: with a larger step the loss goes up and down."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.8)


def small_sgd(parameters: Any) -> torch.optim.Optimizer:
    """For the large numbers of `TransposedRow`."""
    return torch.optim.SGD(parameters, lr=1e-6)
