"""A mask leaves nothing of the first row on the second rank."""

import torch
import torch.distributed as dist
from parts import ParallelAttention, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.attention"
KIND = "not finite"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelAttention):
    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        shift = -dist.get_rank(self.group)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(shift)
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def parallel(group):
    return cut(reference(), group, attention=Wrong)
