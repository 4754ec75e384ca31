"""The parts after the down projection are overwritten by those of rank 0."""

import torch.distributed as dist
from parts import ParallelFeedForward, RowLinear, alike, cut, pair
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.1.mlp.down"
KIND = "sum missing"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Row(RowLinear):
    def leave(self, part):
        def of_rank_0(x):
            x = x.detach().clone()
            dist.broadcast(x, 0, group=self.group)
            return x

        return pair(part, of_rank_0, alike)


class Wrong(ParallelFeedForward):
    row = Row


def parallel(group):
    return cut(reference(), group, layers__1__mlp=Wrong)
