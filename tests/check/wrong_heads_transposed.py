"""The attention views features as (head_dim, heads)."""

from parts import ParallelAttention, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.attention"
KIND = "heads regrouped"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelAttention):
    def split(self, x):
        return x.unflatten(-1, (self.head_dim, -1)).permute(0, 3, 1, 2)


def parallel(group):
    return cut(reference(), group, attention=Wrong)
