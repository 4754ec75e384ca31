"""Under sequence parallelism the bias is added before the reduce-scatter."""

from parts import (
    ColumnLinear,
    ParallelFeedForward,
    RowLinear,
    cut,
    gather_tokens,
    reduce_scatter_tokens,
    scatter_to_ranks,
)
from plain_models import FeedForward, activations, seeded
from torch import nn
from torch.nn import functional as F

batch = activations
MODULE = "0.down"
KIND = "bias on every rank"


def reference():
    return seeded(nn.Sequential(FeedForward()))


class Column(ColumnLinear):
    def enter(self, x):
        return gather_tokens(scatter_to_ranks(x, 1, self.group), self.group)


class Row(RowLinear):
    def forward(self, x):
        return reduce_scatter_tokens(F.linear(x, self.weight, self.bias), self.group)


class Wrong(ParallelFeedForward):
    column, row = Column, Row


def parallel(group):
    return cut(reference(), group, **{"0": Wrong})
