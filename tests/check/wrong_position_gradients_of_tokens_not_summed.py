"""Position embeddings of a rank's tokens, whose gradients are not summed."""

import torch
from parts import SequenceTransformer, scatter_to_ranks, slice_of, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "positions"
KIND = "gradient of a replicated parameter not summed"
ALSO = ("",)


def reference():
    return Transformer(learned_positions=True)


class Wrong(SequenceTransformer):
    def enter(self, x):
        own = self.positions(slice_of(torch.arange(x.shape[1]), 0, self.group))
        return scatter_to_ranks(self.embedding(x), 1, self.group) + own


def parallel(group):
    return Wrong(reference(), group)


def update(model, optimizer, group):
    sum_gradients(model.shared(), group)
    optimizer.step()
