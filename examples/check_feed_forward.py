"""A tensor-parallel feed-forward by hand, for `shardproof check examples/check_feed_forward.py`.

Nothing of shardproof is in it. `parallel` builds the part of one rank and `reference` the plain
module. Move the bias of `RowLinear` before `Sum.apply`, or leave `Copy.apply` out, and check again.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class Copy(torch.autograd.Function):
    """The same on every rank; in backward a sum over the ranks. Megatron-LM calls it f."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """A copy."""
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """The sum."""
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class Sum(torch.autograd.Function):
    """A sum over the ranks; in backward the same. Megatron-LM calls it g."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """The sum."""
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """The same."""
        return gradient


class ColumnLinear(nn.Module):
    """(*, in) to (*, this rank's out)."""

    def __init__(self, plain: nn.Linear, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(plain.weight[rows].detach())
        self.bias = nn.Parameter(plain.bias[rows].detach())

    def forward(self, x: Tensor) -> Tensor:
        """A product with this rank's rows of the weight."""
        return F.linear(Copy.apply(x), self.weight, self.bias)


class RowLinear(nn.Module):
    """(*, this rank's in) to (*, out)."""

    def __init__(self, plain: nn.Linear, columns: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(plain.weight[:, columns].detach())
        self.bias = nn.Parameter(plain.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """The sum over the ranks, then the bias."""
        return Sum.apply(F.linear(x, self.weight)) + self.bias


class FeedForward(nn.Module):
    """Norm, up, GELU and down, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 50)
        self.down = nn.Linear(50, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(*, 16) to the same."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


def reference() -> nn.Module:
    """The plain module."""
    return FeedForward()


def parallel(group: dist.ProcessGroup) -> nn.Module:
    """This rank's part of it."""
    model = FeedForward()  # the seed is the same as before reference()
    rows = torch.arange(50).tensor_split(group.size())[group.rank()]
    model.up = ColumnLinear(model.up, rows)
    model.down = RowLinear(model.down, rows)
    return model


def batch() -> Tensor:
    """What both are called with."""
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def loss(output: Tensor) -> Tensor:
    """A scalar."""
    return output.square().mean()
