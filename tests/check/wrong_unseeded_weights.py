"""A projection starts from weights without a seed."""

import torch
from parts import ParallelAttention, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.attention.o"
KIND = "not deterministic"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelAttention):
    def __init__(self, plain, group):
        super().__init__(plain, group)
        generator = torch.Generator()
        generator.seed()
        with torch.no_grad():
            self.o.weight += torch.rand(self.o.weight.shape, generator=generator)


def parallel(group):
    return cut(reference(), group, layers__0__attention=Wrong)
