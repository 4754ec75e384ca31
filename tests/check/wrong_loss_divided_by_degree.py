"""The loss is divided by the number of ranks."""

import torch.distributed as dist
from parts import cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = ""
KIND = "loss averaged over ranks"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return cut(reference(), group)


def parallel_loss(logits, batch, group):
    return next_token_loss(logits, batch) / dist.get_world_size(group)
