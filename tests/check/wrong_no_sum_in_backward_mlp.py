"""The input of the feed-forward has no sum in backward."""

from parts import ColumnLinear, ParallelFeedForward, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.1.norm2"
KIND = "sum missing"
ALSO = ("layers.1.mlp", "layers.1.mlp.up")
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Column(ColumnLinear):
    def enter(self, x):
        return x


class Wrong(ParallelFeedForward):
    column = Column


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
