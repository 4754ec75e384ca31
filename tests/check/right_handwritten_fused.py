"""A fused query-key-value weight, a gated feed-forward, and experts."""

from parts import cut
from plain_models import Block, Experts, FusedAttention, GatedFeedForward, activations, seeded
from torch import nn

batch = activations


def reference():
    return seeded(
        nn.Sequential(
            Block(FusedAttention(), GatedFeedForward()), Block(FusedAttention(), Experts())
        )
    )


def parallel(group):
    return cut(reference(), group)
