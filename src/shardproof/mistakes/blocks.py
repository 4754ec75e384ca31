"""The linear layers in which mistakes are made, with numbers of their own; torch draws nothing."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from shardproof.axis import Axis

IN, OUT, BATCH = 12, 7, 5
EVEN = 48  # units of the cut dim: 8 leaves of 6, so that at degree 2 all shards have one size

Activation = Callable[[Tensor], Tensor]
Change = Callable[[nn.Module, Axis], None]


class Block(nn.Module):
    """A replicated linear, then column and row parallel ones; every kind of gradient occurs.

    Args:
        front: replicated; its gradients are right only if `up` sums its input gradient.
        up: column parallel, or plain.
        down: row parallel, or plain.
        activation: between `up` and `down`, on what is cut.
    """

    def __init__(
        self, front: nn.Module, up: nn.Module, down: nn.Module, activation: Activation
    ) -> None:
        super().__init__()
        self.front, self.up, self.down = front, up, down
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x: (5, 12), Replicate, to (5, 7), Replicate."""
        y: Tensor = self.down(self.activation(self.up(self.front(x))))
        return y


def linear(in_features: int, out_features: int, seed: int) -> nn.Linear:
    """A plain linear with numbers of its own; torch's global generator is not asked.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        seed: from which weight and bias are drawn.
    """
    layer = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return layer


def batch(columns: int = OUT, *, seed: int = 99) -> tuple[Tensor, Tensor]:
    """Input (5, 12) and target (5, columns), Replicate."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(BATCH, IN, generator=generator),
        torch.randn(BATCH, columns, generator=generator),
    )


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Gradient descent with momentum."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
