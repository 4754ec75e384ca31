"""The attention biases do not require gradients on the ranks."""

from parts import cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.attention.q"
KIND = "gradient missing"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    model = cut(reference(), group)
    model.layers[0].attention.q.weight.requires_grad_(False)
    return model
