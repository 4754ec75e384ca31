"""The head joins the logits of rank 0 with themselves."""

import torch
import torch.distributed as dist
from parts import ColumnLinear, cut, pair, rows_of_rank, slice_of
from plain_models import VOCABULARY, Transformer, next_token_loss, tokens

MODULE = "head"
KIND = "one shard on all ranks"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ColumnLinear):
    def forward(self, x):
        def of_rank_0(part):
            part = part.clone()
            dist.broadcast(part, 0, group=self.group)
            return torch.cat([part, part], -1)

        return pair(super().forward(x), of_rank_0, lambda g: slice_of(g, -1, self.group))


def head(plain, group):
    return Wrong(plain, group, rows_of_rank(VOCABULARY, group))


def parallel(group):
    return cut(reference(), group, head=head)
