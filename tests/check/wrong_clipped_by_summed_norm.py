"""The squares of all gradients are summed over the ranks, those of replicated parameters too."""

import torch
from parts import clip_gradients, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "embedding"
KIND = "norm counts replicated gradients"
ALSO = ("", "layers.0.norm1")
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def reference_update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def parallel(group):
    return cut(reference(), group)


def update(model, optimizer, group):
    clip_gradients(model, group, 0.05, lambda name: True)
    optimizer.step()
