"""Outputs that stay DTensors between layers."""

from dtensor_plans import planned
from plain_models import FeedForward, activations, seeded
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

batch = activations


def reference():
    return seeded(FeedForward())


def parallel(group):
    up = ColwiseParallel(use_local_output=False)
    return planned(reference(), group, {"up": up, "down": RowwiseParallel()})
