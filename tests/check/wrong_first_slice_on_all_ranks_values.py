"""All ranks take the first heads of the values."""

import torch
from parts import ColumnLinear, ParallelAttention, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.attention.v"
KIND = "one shard on all ranks"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelAttention):
    def __init__(self, plain, group):
        super().__init__(plain, group)
        self.v = ColumnLinear(plain.v, group, torch.arange(8))


def parallel(group):
    return cut(reference(), group, attention=Wrong)
