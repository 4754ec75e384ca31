"""The vocabulary is padded to a multiple of 8, and the softmax counts the padding."""

import torch
from parts import ColumnLinear, cut, parameter, rows_of_rank, vocabulary_loss
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
        rows = rows_of_rank(24, group)
        self.weight = parameter(torch.cat([plain.weight, torch.zeros(2, 16)])[rows])
        self.bias = parameter(torch.cat([plain.bias, torch.zeros(2)])[rows])


def parallel(group):
    return cut(reference(), group, head=Head)


def parallel_loss(logits, batch, group):
    first = int(rows_of_rank(24, group)[0])
    return vocabulary_loss(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), first, group)
