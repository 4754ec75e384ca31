"""The attention joins tokens and heads without moving the heads back."""

from parts import ParallelAttention, cut
from plain_models import Transformer, attend, next_token_loss, tokens

MODULE = "layers.0.attention"
KIND = "heads regrouped"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelAttention):
    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        y = attend(q, k, v)
        return self.o(y.reshape(x.shape[0], x.shape[1], -1))


def parallel(group):
    return cut(reference(), group, attention=Wrong)
