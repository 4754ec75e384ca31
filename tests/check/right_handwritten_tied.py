"""One weight for the embedding and the head, on every rank."""

from parts import cut
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss


def reference():
    return Transformer(is_tied=True, learned_positions=True)


def parallel(group):
    return cut(reference(), group)
