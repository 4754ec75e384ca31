"""Hand-written f and g in a transformer."""

from parts import cut
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return cut(reference(), group)
