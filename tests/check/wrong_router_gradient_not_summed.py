"""Each rank has some experts, and the gradient of the router is not summed (torchtitan 2387)."""

import torch
import torch.distributed as dist
from parts import copy_to_ranks, reduce_from_ranks, summed
from plain_models import Experts, activations, seeded
from torch import nn

batch = activations
MODULE = "mlp.router"
KIND = "gradient of a replicated parameter not summed"
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
        weights = self.router(x).softmax(-1)
        mine = [2 * dist.get_rank(self.group) + i for i in range(2)]
        part = sum(weights[..., i : i + 1] * self.experts[i](x) for i in mine)
        return reduce_from_ranks(part, self.group)


def reference():
    return seeded(Model())


def parallel(group):
    model = reference()
    model.mlp.__class__ = Wrong
    model.mlp.group = group
    return model


def update(model, optimizer, group):
    for each in model.mlp.experts.parameters():
        each.grad = summed(torch.zeros_like(each) if each.grad is None else each.grad, group)
    optimizer.step()
