"""Under sequence parallelism all ranks draw one mask for their tokens."""

from parts import SequenceTransformer, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.0.dropout"
KIND = "dropout alike"


def reference():
    return Transformer(dropout=0.2)


def parallel(group):
    return SequenceTransformer(reference(), group)


def update(model, optimizer, group):
    sum_gradients(model.shared(), group)
    optimizer.step()
