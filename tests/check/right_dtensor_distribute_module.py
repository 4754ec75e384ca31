"""distribute_module of torch, with a partition of one's own."""

from plain_models import FeedForward, activations, seeded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

batch = activations


def reference():
    return seeded(FeedForward())


def partition(name, module, mesh):
    placements = {"up": Shard(0), "down": Shard(1)}
    if name in placements:
        weight = distribute_tensor(module.weight, mesh, [placements[name]])
        bias = [Shard(0)] if name == "up" else [Replicate()]
        module.weight = nn.Parameter(weight)
        module.bias = nn.Parameter(distribute_tensor(module.bias, mesh, bias))


def enter(module, inputs, mesh):
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)


def leave(module, output, mesh):
    return output.redistribute(mesh, [Replicate()]).to_local()


def parallel(group):
    mesh = init_device_mesh("cpu", (group.size(),))
    return distribute_module(reference(), mesh, partition, enter, leave)
