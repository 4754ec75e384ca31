"""The gradients of the shared value head are summed, those of the key head are not."""

from parts import cut, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.1.attention.k"
KIND = "key-value gradients not summed"


def reference():
    return Transformer(key_value_heads=1)


def parallel(group):
    return cut(reference(), group)


def update(model, optimizer, group):
    for layer in model.layers:
        sum_gradients(layer.attention.v.parameters(), group)
    optimizer.step()
