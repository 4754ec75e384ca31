"""The down projection adds its bias before the sum."""

from parts import ParallelFeedForward, RowLinear, cut, reduce_from_ranks
from plain_models import Transformer, next_token_loss, tokens
from torch.nn import functional as F

MODULE = "layers.0.mlp.down"
KIND = "bias on every rank"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Row(RowLinear):
    def forward(self, x):
        return reduce_from_ranks(F.linear(x, self.weight, self.bias), self.group)


class Wrong(ParallelFeedForward):
    row = Row


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
