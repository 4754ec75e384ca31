"""Each rank takes the up slice of the next rank."""

import torch
import torch.distributed as dist
from parts import ColumnLinear, ParallelFeedForward, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.mlp.up"
KIND = "ranks in another order"
ALSO = ("layers.0.mlp.down",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelFeedForward):
    def __init__(self, plain, group):
        super().__init__(plain, group)
        rows = torch.arange(32).tensor_split(2)[1 - dist.get_rank(group)]
        self.up = ColumnLinear(plain.up, group, rows)


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
