"""The down projection sums twice."""

from parts import ParallelFeedForward, RowLinear, cut, reduce_from_ranks
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.mlp.down"
KIND = "sum made twice"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Row(RowLinear):
    def leave(self, part):
        return reduce_from_ranks(super().leave(part), self.group)


class Wrong(ParallelFeedForward):
    row = Row


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
