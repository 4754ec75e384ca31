"""Sequence parallelism: norms see a rank's tokens, and their gradients are summed."""

from parts import SequenceTransformer, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss


def reference():
    return Transformer(positions="rotary")


def parallel(group):
    return SequenceTransformer(reference(), group)


def update(model, optimizer, group):
    sum_gradients(model.shared(), group)
    optimizer.step()
