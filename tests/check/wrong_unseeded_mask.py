"""The feed-forward drops features by a mask without a seed."""

import torch
from parts import ParallelFeedForward, cut
from plain_models import Transformer, next_token_loss, tokens
from torch.nn import functional as F

MODULE = "layers.0.mlp"
KIND = "not deterministic"
ALSO = ("layers.0.mlp.down",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelFeedForward):
    def forward(self, x):
        y = F.gelu(self.up(x))
        generator = torch.Generator()
        generator.seed()
        keep = torch.rand(y.shape, generator=generator) > 0.1
        return self.down(y * keep)


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
