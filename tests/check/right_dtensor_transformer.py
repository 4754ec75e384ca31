"""parallelize_module of torch, on a transformer."""

from dtensor_plans import BLOCKS, planned
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return planned(reference(), group, BLOCKS)
