"""One key-value head, on both ranks; its gradients are summed before the update."""

from parts import cut, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss


def reference():
    return Transformer(key_value_heads=1, positions="rotary")


def parallel(group):
    return cut(reference(), group)


def update(model, optimizer, group):
    for layer in model.layers:
        for each in (layer.attention.k, layer.attention.v):
            sum_gradients(each.parameters(), group)
    optimizer.step()
