"""The pattern of torch's example of sequence parallelism: a two-layer MLP on cut activations."""

import torch
from plain_models import seeded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(10, 32)
        self.relu = nn.ReLU()
        self.out_proj = nn.Linear(32, 5)

    def forward(self, x):
        return self.out_proj(self.relu(self.in_proj(x)))


def batch():
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(4))


def reference():
    return seeded(ToyModel())


def parallel(group):
    mesh = init_device_mesh("cpu", (group.size(),))
    plan = {
        "in_proj": ColwiseParallel(input_layouts=Shard(0)),
        "out_proj": RowwiseParallel(output_layouts=Shard(0)),
    }
    model = parallelize_module(reference(), mesh, plan)
    model.register_forward_pre_hook(
        lambda _, args: (args[0].chunk(group.size())[group.rank()].contiguous(),)
    )
    return model


def parallel_loss(output, batch, group):
    return output.square().sum() / (batch.shape[0] * 5)
