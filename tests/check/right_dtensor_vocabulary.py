"""An embedding and a head that DTensor cuts along the vocabulary; AdamW."""

import torch
from dtensor_plans import BLOCKS, VOCABULARY, planned
from plain_models import Transformer, next_token_loss, tokens

batch, loss, steps = tokens, next_token_loss, 2


def reference():
    return Transformer(positions="rotary")


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, foreach=False)


def parallel(group):
    return planned(reference(), group, BLOCKS | VOCABULARY)
