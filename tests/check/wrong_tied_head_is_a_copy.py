"""The head has a copy of the embedding in place of the embedding itself."""

from parts import cut, parameter
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "head"
KIND = "stale weight"
ALSO = ("embedding",)


def reference():
    return Transformer(is_tied=True)


def parallel(group):
    model = cut(reference(), group)
    model.head.weight = parameter(model.embedding.weight)
    return model
