"""Routing weights are gathered by a collective without a backward, as in Automodel 2995."""

import torch
import torch.distributed as dist
from parts import cut
from plain_models import Experts, activations, seeded
from torch import nn

batch = activations
MODULE = "mlp.router"
KIND = "gradient missing"
ALSO = ("mlp",)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Experts()

    def forward(self, x):
        return x + self.mlp(x)


class Wrong(Experts):
    def forward(self, x):
        own = self.router(x).softmax(-1).chunk(2, -1)[dist.get_rank()].contiguous()
        parts = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(parts, own.detach())
        weights = torch.cat(parts, -1).split(1, -1)
        return sum(w * expert(x) for w, expert in zip(weights, self.experts, strict=True))


def reference():
    return seeded(Model())


def parallel(group):
    model = cut(reference(), group, mlp=lambda plain, _: plain)
    model.mlp.__class__ = Wrong
    return model
