"""Weights decay in the optimizer and once more in the update."""

import torch
from parts import cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "embedding"
KIND = "weight decay twice"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def parallel(group):
    return cut(reference(), group)


def update(model, optimizer, group):
    optimizer.step()
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(1 - 0.01 * 0.1)
