"""A norm has another epsilon than the plain one."""

from parts import cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.1.norm2"
KIND = None
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    model = cut(reference(), group)
    model.layers[1].norm2.eps = 1e-6
    return model
