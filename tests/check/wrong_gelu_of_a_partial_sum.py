"""The activation comes before the sum of a row-parallel layer."""

from parts import ColumnLinear, RowLinear, rows_of_rank
from plain_models import activations, seeded
from torch import nn
from torch.nn import functional as F

batch = activations
MODULE = "second"
KIND = None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return F.gelu(self.second(self.first(x)))


class Late(RowLinear):
    def leave(self, part):
        return super().leave(F.gelu(part))


def reference():
    return seeded(Model())


def parallel(group):
    model = reference()
    rows = rows_of_rank(24, group)
    model.first = ColumnLinear(model.first, group, rows)
    model.second = Late(model.second, group, rows)
    return model
