"""The parts after the down projection are averaged."""

import torch.distributed as dist
from parts import ParallelFeedForward, RowLinear, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.mlp.down"
KIND = "averaged, not summed"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Row(RowLinear):
    def leave(self, part):
        return super().leave(part) / dist.get_world_size(self.group)


class Wrong(ParallelFeedForward):
    row = Row


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
