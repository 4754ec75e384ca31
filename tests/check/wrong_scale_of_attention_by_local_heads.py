"""The scores are divided by the square root of the width of a rank."""

from parts import ParallelAttention, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.attention"
KIND = None
ALSO = ("layers.0.attention.o",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelAttention):
    def forward(self, x):
        return super().forward(x)

    def split(self, x):
        return super().split(x) * (self.head_dim / (self.head_dim * self.heads / 4)) ** 0.25


def parallel(group):
    return cut(reference(), group, attention=Wrong)
