"""Under sequence parallelism each rank numbers its tokens from 0."""

import torch
from parts import SequenceTransformer, scatter_to_ranks, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = ""
KIND = "positions or masks of other heads"
ALSO = ("positions",)


def reference():
    return Transformer(learned_positions=True)


class Wrong(SequenceTransformer):
    def enter(self, x):
        hidden = scatter_to_ranks(self.embedding(x), 1, self.group)
        return hidden + self.positions(torch.arange(hidden.shape[1]))


def parallel(group):
    return Wrong(reference(), group)


def update(model, optimizer, group):
    sum_gradients(model.shared(), group)
    optimizer.step()
