"""The model seeds by rank at its start, and drops replicated activations."""

import torch
import torch.distributed as dist
from parts import cut
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.0.dropout"
KIND = "dropout apart"


def reference():
    return Transformer(dropout=0.2)


class Wrong(Transformer):
    def forward(self, x):
        torch.manual_seed(dist.get_rank())
        return super().forward(x)


def parallel(group):
    model = cut(reference(), group)
    model.__class__ = Wrong
    return model
