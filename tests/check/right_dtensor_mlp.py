"""parallelize_module of torch, on a feed-forward."""

from plain_models import FeedForward, activations, seeded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

batch = activations


def reference():
    return seeded(FeedForward())


def parallel(group):
    mesh = init_device_mesh("cpu", (group.size(),))
    return parallelize_module(
        reference(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
