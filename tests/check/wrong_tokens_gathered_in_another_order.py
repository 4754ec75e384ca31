"""Under sequence parallelism the tokens are joined from the last rank to the first."""

import torch
from parts import ColumnLinear, ParallelFeedForward, cut, joined, pair, scatter_to_ranks, slice_of
from plain_models import FeedForward, activations, seeded
from torch import nn

batch = activations
MODULE = "0.up"
KIND = "ranks in another order"


def reference():
    return seeded(nn.Sequential(FeedForward()))


class Column(ColumnLinear):
    def enter(self, x):
        def backwards(part):
            return torch.cat(joined(part, 1, self.group).chunk(2, 1)[::-1], 1)

        part = scatter_to_ranks(x, 1, self.group)
        return pair(part, backwards, lambda g: slice_of(g, 1, self.group))


class Wrong(ParallelFeedForward):
    column = Column


def parallel(group):
    return cut(reference(), group, **{"0": Wrong})
