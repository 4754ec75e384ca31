"""g sums in backward too, so gradients before it are twice as large."""

from parts import ParallelFeedForward, RowLinear, cut, pair, summed
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.1.mlp.down"
KIND = "sum made twice"
ALSO = ("layers.1.mlp", "layers.1.mlp.dropout", "layers.1.mlp.up")
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Row(RowLinear):
    def leave(self, part):
        return pair(part, lambda x: summed(x, self.group), lambda g: summed(g, self.group))


class Wrong(ParallelFeedForward):
    row = Row


def parallel(group):
    return cut(reference(), group, layers__1__mlp=Wrong)
