"""A Partial local tensor is declared to be Replicate."""

from plain_models import FeedForward, activations, seeded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

batch = activations
MODULE = "down"
KIND = "sum missing"


class Row(nn.Module):
    def __init__(self, plain, mesh):
        super().__init__()
        self.mesh = mesh
        rank, size = mesh.get_local_rank(), mesh.size()
        self.weight = nn.Parameter(plain.weight.chunk(size, 1)[rank].detach().clone())
        self.bias = plain.bias

    def forward(self, x):
        part = F.linear(x, self.weight)
        whole = DTensor.from_local(part, self.mesh, [Replicate()], run_check=False)
        return whole.full_tensor() + self.bias


def reference():
    return seeded(FeedForward())


def parallel(group):
    mesh = init_device_mesh("cpu", (group.size(),))
    model = reference()
    model.down = Row(model.down, mesh)
    return parallelize_module(model, mesh, {"up": ColwiseParallel()})
