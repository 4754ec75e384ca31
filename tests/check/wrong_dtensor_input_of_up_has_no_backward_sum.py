"""The first linear takes a local tensor as it is, without the sum of its gradient."""

from dtensor_plans import BLOCKS, planned
from plain_models import Transformer, next_token_loss, tokens
from torch import nn

MODULE = "layers.0.norm2"
KIND = "sum missing"
ALSO = ("layers.0.mlp", "layers.0.mlp.up")
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    model = planned(reference(), group, BLOCKS)
    rank, size = group.rank(), group.size()
    plain = reference().layers[0].mlp.up
    new = nn.Linear(16, 32 // size)
    new.weight = nn.Parameter(plain.weight.chunk(size)[rank].detach().clone())
    new.bias = nn.Parameter(plain.bias.chunk(size)[rank].detach().clone())
    model.layers[0].mlp.up = new
    return model
