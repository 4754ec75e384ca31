"""Each rank draws its own mask for the residual branch, which all have."""

import torch
import torch.distributed as dist
from parts import cut
from plain_models import Transformer, next_token_loss, tokens
from torch import nn

batch, loss = tokens, next_token_loss
MODULE = "layers.0.dropout"
KIND = "dropout apart"


def reference():
    return Transformer(dropout=0.2)


class Wrong(nn.Dropout):
    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(dist.get_rank() + 5)
            return super().forward(x)


def dropout(plain, group):
    return Wrong(plain.p)


def parallel(group):
    return cut(reference(), group, layers__0__dropout=dropout, layers__1__dropout=dropout)
