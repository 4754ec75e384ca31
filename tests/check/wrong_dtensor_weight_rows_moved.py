"""The up projection is distributed from rows in another order."""

import torch
from dtensor_plans import BLOCKS, planned
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.mlp.up"
KIND = "blocks swapped"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    model = reference()
    up = model.layers[0].mlp.up
    with torch.no_grad():
        for each in (up.weight, up.bias):
            each.copy_(each.roll(8, 0))
    return planned(model, group, BLOCKS)
