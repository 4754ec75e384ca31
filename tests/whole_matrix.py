"""What tests of optimizers share: a small cut model, its training, and what all ranks hold."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invariance import normal
from shardproof import comm
from shardproof.axis import Axis
from shardproof.leaves import Layout
from shardproof.optim import layouts_of
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, RowParallel
from shardproof.prover.hashing import owned_part
from shardproof.scheme import DEFAULT_SCHEME, Scheme

PLAN = {
    "up": ColumnParallel(), "mid": RowParallel(), "narrow": ColumnParallel(), "down": RowParallel()
}  # fmt: skip


class Model(nn.Module):
    """Matrices cut along the longer and the shorter side, cut and whole biases, a plain matrix.

    43 and 11 divide by nothing; `narrow` has 3 units, so that of 8 ranks five are idle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(11, 11)
        self.up = nn.Linear(11, 43)
        self.act = nn.SiLU()
        self.mid = nn.Linear(43, 5)
        self.narrow = nn.Linear(5, 3)
        self.down = nn.Linear(3, 11)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 4

    def forward(self, x: Tensor) -> Tensor:
        middle = self.mid(self.act(self.up(self.inner(x))))
        y: Tensor = self.down(self.act(self.narrow(middle)))
        return x + y


def cut_model(axis: Axis, scheme: Scheme = DEFAULT_SCHEME) -> Any:
    return parallelize(Model(), PLAN, axis, scheme=scheme)


def backward(model: nn.Module, seed: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    x, grad = (normal(2, 9, 11, seed=each + seed).to(dtype) for each in (50, 70))
    model(x).backward(grad)


def is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim == 2


Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def train(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int = 3) -> None:
    for step in range(steps):
        model.zero_grad()
        backward(model, seed=step)
        for optimizer in optimizers:
            optimizer.step()


def whole(value: Tensor, layout: Layout, axis: Axis | None) -> Tensor:
    """A tensor put together from all ranks."""
    value = owned_part(value.detach(), layout).clone()
    if axis is None or layout.cut is None or layout.dim is None:
        return value
    return comm.all_gather(value, axis, dim=layout.dim, cut=layout.cut, direction="prover")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: whole(parameter, layout, axis) for name, parameter, layout, axis in layouts_of(model)
    }
