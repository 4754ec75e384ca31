"""The logits are gathered with their padding, and the loss counts it."""

import torch
from parts import ColumnLinear, cut, gather_from_ranks, parameter, rows_of_rank
from plain_models import Transformer, next_token_loss, tokens

MODULE = ""
KIND = "padding counted"
ALSO = ("head",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Head(ColumnLinear):
    def __init__(self, plain, group):
        super().__init__(plain, group, torch.arange(1))
        rows = rows_of_rank(32, group)
        self.weight = parameter(torch.cat([plain.weight, torch.zeros(10, 16)])[rows])
        self.bias = parameter(torch.cat([plain.bias, torch.zeros(10)])[rows])

    def forward(self, x):
        return gather_from_ranks(super().forward(x), -1, self.group)


def parallel(group):
    return cut(reference(), group, head=Head)
