"""All gradients are divided by the number of ranks before the update."""

import torch.distributed as dist
from parts import alike, cut, pair
from plain_models import Transformer, next_token_loss, tokens

MODULE = ""
KIND = "loss averaged over ranks"
ALSO = ("head",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return cut(reference(), group)


def parallel_loss(logits, batch, group):
    d = dist.get_world_size(group)
    return pair(next_token_loss(logits, batch), alike, lambda g: g / d)
