"""Gate and up have each other's weights."""

from parts import ParallelGatedFeedForward, cut
from plain_models import GatedFeedForward, Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.0.mlp.gate"
KIND = "blocks swapped"
ALSO = ("layers.0.mlp.up",)


def reference():
    return Transformer(mlp=GatedFeedForward)


class Wrong(ParallelGatedFeedForward):
    def __init__(self, plain, group):
        super().__init__(plain, group)
        self.gate, self.up = self.up, self.gate


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
