"""All ranks draw one mask for their slices of the inner features."""

from parts import ParallelFeedForward, cut
from plain_models import FeedForward, Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.0.mlp.dropout"
KIND = "dropout alike"
ALSO = ("layers.0.mlp",)


class Dropped(FeedForward):
    def __init__(self):
        super().__init__(dropout=0.2)


def reference():
    return Transformer(mlp=Dropped)


def parallel(group):
    return cut(reference(), group, mlp=ParallelFeedForward)
