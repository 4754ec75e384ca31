"""A small gated model of odd widths, and the plan that cuts it."""

from collections.abc import Callable

from torch import Tensor, nn

from invariance import normal
from shardproof.plans.style import ColumnParallel, RowParallel


class Mlp(nn.Module):
    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(10, width, bias=False)
        self.up_proj = nn.Linear(10, width)
        self.down_proj = nn.Linear(width, 10)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    """Two gated blocks between plain layers."""

    def __init__(self, width: int = 43, act: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.layers = nn.ModuleList(Mlp(width, act()) for _ in range(2))
        self.norm = nn.RMSNorm(10)
        self.head = nn.Linear(10, 5)
        for seed, parameter in enumerate(self.parameters()):
            if not parameter.is_meta:
                parameter.data = normal(*parameter.shape, seed=seed) / 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


PLAN = {
    "layers.*.gate_proj": ColumnParallel(),
    "layers.*.up_proj": ColumnParallel(),
    "layers.*.down_proj": RowParallel(),
}
