"""The up projection multiplies by a copy of its weight that it made at the start."""

from parts import ColumnLinear, ParallelFeedForward, cut, pair
from plain_models import Transformer, next_token_loss, tokens
from torch.nn import functional as F

MODULE = "layers.0.mlp.up"
KIND = "stale weight"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Column(ColumnLinear):
    def forward(self, x):
        if not hasattr(self, "cached"):
            self.cached = self.weight.detach().clone()
        cached = self.cached
        weight = pair(self.weight, lambda _: cached.clone(), lambda g: g)
        return F.linear(self.enter(x), weight, self.bias)


class Wrong(ParallelFeedForward):
    column = Column


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
