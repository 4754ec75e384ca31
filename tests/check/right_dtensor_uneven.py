"""An inner size that two ranks do not divide."""

from dtensor_plans import planned
from plain_models import FeedForward, activations, seeded
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

batch = activations


def reference():
    return seeded(FeedForward(inner=37))


def parallel(group):
    # An output that is no DTensor has lost its size, so the next layer would take it for even.
    up = ColwiseParallel(use_local_output=False)
    return planned(reference(), group, {"up": up, "down": RowwiseParallel()})
