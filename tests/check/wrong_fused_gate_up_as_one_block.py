"""The fused gate-up weight is cut as one block."""

from parts import ColumnLinear, RowLinear, rows_of_rank
from plain_models import activations, seeded
from torch import nn
from torch.nn import functional as F

batch = activations
MODULE = "0.gate_up"
KIND = "fused weight cut as one block"
ALSO = ("0",)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def reference():
    return seeded(nn.Sequential(Fused()))


def parallel(group):
    model = reference()
    model[0].gate_up = ColumnLinear(model[0].gate_up, group, rows_of_rank(64, group))
    model[0].down = RowLinear(model[0].down, group, rows_of_rank(32, group))
    return model
