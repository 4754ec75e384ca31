"""One key-value head is on both ranks, and its gradients are not summed."""

from parts import cut
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.1.attention.v"
KIND = "key-value gradients not summed"
ALSO = ("layers.1.attention.k",)


def reference():
    return Transformer(key_value_heads=1)


def parallel(group):
    return cut(reference(), group)
