"""Queries are interleaved over the key-value heads of the rank."""

from parts import ParallelAttention, cut
from plain_models import Transformer, attend, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.0.attention"
KIND = "heads regrouped"


def reference():
    return Transformer(heads=8, key_value_heads=4)


class Wrong(ParallelAttention):
    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        count = q.shape[1] // k.shape[1]
        k, v = k.repeat(1, count, 1, 1), v.repeat(1, count, 1, 1)
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


def parallel(group):
    return cut(reference(), group, attention=Wrong)
