"""All ranks use the ALiBi slopes of rank 0."""

from parts import ParallelAttention, cut
from plain_models import Transformer, alibi, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.0.attention"
KIND = "positions or masks of other heads"


def reference():
    return Transformer(positions="alibi")


class Wrong(ParallelAttention):
    def bias(self, length, dtype):
        return alibi(self.heads, length, dtype)


def parallel(group):
    return cut(reference(), group, attention=Wrong)
