"""Four ranks, one head each."""

from dtensor_plans import BLOCKS, planned
from plain_models import Transformer, next_token_loss, tokens

batch, loss, degree = tokens, next_token_loss, 4


def reference():
    return Transformer()


def parallel(group):
    return planned(reference(), group, BLOCKS)
