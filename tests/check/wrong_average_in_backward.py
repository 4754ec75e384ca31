"""f averages gradients in backward."""

import torch.distributed as dist
from parts import ColumnLinear, ParallelFeedForward, alike, cut, pair, summed
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.1.norm2"
KIND = "averaged, not summed"
ALSO = ("layers.1.mlp", "layers.1.mlp.up")
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Column(ColumnLinear):
    def enter(self, x):
        d = dist.get_world_size(self.group)
        return pair(x, alike, lambda g: summed(g, self.group) / d)


class Wrong(ParallelFeedForward):
    column = Column


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
