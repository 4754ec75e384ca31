"""Routing weights of other ranks' experts are zero in forward only, as in transformers 48687."""

import torch.distributed as dist
from parts import copy_to_ranks, reduce_from_ranks, sum_gradients
from plain_models import Experts, activations, seeded
from torch import nn

batch = activations
MODULE = "mlp.router"
KIND = "sum made twice"
ALSO = ("mlp",)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Experts()

    def forward(self, x):
        return x + self.mlp(x)


class Wrong(Experts):
    def forward(self, x):
        x = copy_to_ranks(x, self.group)
        weights = self.router(x).softmax(-1).split(1, -1)
        first = 2 * dist.get_rank(self.group)
        part = 0
        for i, (weight, expert) in enumerate(zip(weights, self.experts, strict=True)):
            is_mine = first <= i < first + 2
            part = part + (weight if is_mine else weight - weight.detach()) * expert(x)
        return reduce_from_ranks(part, self.group)


def reference():
    return seeded(Model())


def parallel(group):
    model = reference()
    model.mlp.__class__ = Wrong
    model.mlp.group = group
    return model


def update(model, optimizer, group):
    sum_gradients(model.parameters(), group)
    optimizer.step()
