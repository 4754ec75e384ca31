"""A gate for each head is taken for the first heads on all ranks."""

import torch
from parts import ParallelAttention, cut
from plain_models import Attention, activations, attend, seeded
from torch import nn

batch = activations
MODULE = "attention"
KIND = "positions or masks of other heads"


class Gated(Attention):
    def __init__(self):
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        y = attend(q, k, v) * self.gates.sigmoid()[: q.shape[1], None, None]
        return self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Gated()

    def forward(self, x):
        return x + self.attention(x)


class Wrong(ParallelAttention):
    forward = Gated.forward

    def __init__(self, plain, group):
        super().__init__(plain, group)
        self.gates = plain.gates


def reference():
    return seeded(Model())


def parallel(group):
    return cut(reference(), group, attention=Wrong)
