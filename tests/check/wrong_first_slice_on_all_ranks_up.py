"""All ranks take the first slice of the up and down projections."""

import torch
from parts import ColumnLinear, ParallelFeedForward, RowLinear, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.mlp.up"
KIND = "one shard on all ranks"
ALSO = ("layers.0.mlp.down", "layers.0.mlp")
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelFeedForward):
    def __init__(self, plain, group):
        super().__init__(plain, group)
        rows = torch.arange(16)
        self.up, self.down = ColumnLinear(plain.up, group, rows), RowLinear(plain.down, group, rows)


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
