"""The head joins the slices of the ranks from the last to the first."""

import torch
from parts import ColumnLinear, cut, joined, pair, rows_of_rank, slice_of
from plain_models import VOCABULARY, Transformer, next_token_loss, tokens

MODULE = "head"
KIND = "ranks in another order"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ColumnLinear):
    def forward(self, x):
        def backwards(part):
            return torch.cat(joined(part, -1, self.group).chunk(2, -1)[::-1], -1)

        return pair(super().forward(x), backwards, lambda g: slice_of(g, -1, self.group))


def head(plain, group):
    return Wrong(plain, group, rows_of_rank(VOCABULARY, group))


def parallel(group):
    return cut(reference(), group, head=head)
