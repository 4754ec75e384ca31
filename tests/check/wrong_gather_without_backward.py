"""The logits are gathered by a collective that has no backward."""

import torch
import torch.distributed as dist
from parts import ColumnLinear, cut, rows_of_rank
from plain_models import VOCABULARY, Transformer, next_token_loss, tokens

MODULE = "head"
KIND = "gradient missing"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ColumnLinear):
    def forward(self, x):
        part = super().forward(x)
        parts = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(parts, part.detach().contiguous(), group=self.group)
        whole = torch.cat(parts, -1)
        return whole + 0 * x.sum()


def head(plain, group):
    return Wrong(plain, group, rows_of_rank(VOCABULARY, group))


def parallel(group):
    return cut(reference(), group, head=head)
