"""An inner size and a number of heads that two ranks do not divide."""

from parts import cut
from plain_models import Attention, Block, FeedForward, activations, seeded

batch = activations


def reference():
    return seeded(Block(Attention(heads=5), FeedForward(inner=37)))


def parallel(group):
    return cut(reference(), group)
