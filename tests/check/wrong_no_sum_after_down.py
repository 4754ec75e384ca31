"""Nothing sums the parts after the down projection."""

from parts import ParallelFeedForward, RowLinear, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.mlp.down"
KIND = "sum missing"
ALSO = ("layers.0.mlp",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Row(RowLinear):
    def leave(self, part):
        return part


class Wrong(ParallelFeedForward):
    row = Row


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
