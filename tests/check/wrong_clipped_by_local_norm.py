"""Each rank clips by the norm of its own gradients."""

import torch
from parts import cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "embedding"
KIND = "norm counts replicated gradients"
ALSO = ("",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def reference_update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def parallel(group):
    return cut(reference(), group)


def update(model, optimizer, group):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
