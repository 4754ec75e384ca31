"""SequenceParallel norms of DTensor."""

from dtensor_plans import planned, sequence
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return planned(reference(), group, sequence())
