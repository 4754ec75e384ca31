"""AdamW with clipping by the norm of the whole model, for two steps."""

import torch
from parts import clip_gradients, cut
from plain_models import Transformer, next_token_loss, tokens

batch, loss, steps = tokens, next_token_loss, 2


def reference():
    return Transformer(positions="alibi")


def parallel(group):
    return cut(reference(), group)


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def is_cut(name):
    return any(each in name for each in (".q.", ".k.", ".v.", ".up.", "o.weight", "down.weight"))


def update(model, optimizer, group):
    clip_gradients(model, group, 0.05, is_cut)
    optimizer.step()


def reference_update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
