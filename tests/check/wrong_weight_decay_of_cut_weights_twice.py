"""Cut weights are in two groups of the update, and decay in both."""

import torch
from parts import cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.attention.q"
KIND = "weight decay twice"
ALSO = ("layers.0.mlp.up",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)


def parallel(group):
    return cut(reference(), group)


def update(model, optimizer, group):
    with torch.no_grad():
        for name, each in model.named_parameters():
            if ".q." in name or ".up." in name:
                each.sub_(0.1 * 0.01 * each)
    optimizer.step()
