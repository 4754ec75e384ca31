"""Whole logits go into a loss that sums exponentials over the ranks, as in Megatron-LM 7452."""

import torch
from parts import ColumnLinear, cut, gather_from_ranks, rows_of_rank, summed
from plain_models import VOCABULARY, Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = ""
KIND = "sum made twice"
ALSO = ("head",)


def reference():
    return Transformer()


class Head(ColumnLinear):
    def forward(self, x):
        return gather_from_ranks(super().forward(x), -1, self.group)


def head(plain, group):
    return Head(plain, group, rows_of_rank(VOCABULARY, group))


def parallel(group):
    return cut(reference(), group, head=head)


def parallel_loss(logits, batch, group):
    rows, labels = logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
    total = rows.exp().sum(-1)
    total = total + (summed(total, group) - total.detach())
    return (total.log() - rows.gather(1, labels[:, None])[:, 0]).mean() + 0 * torch.zeros(())
