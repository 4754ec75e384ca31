"""Each rank has the mean loss of its tokens; their mean is not that of all tokens."""

from parts import cut, reduce_from_ranks, slice_of
from plain_models import Transformer, tokens
from torch.nn import functional as F

batch = tokens
MODULE = ""
KIND = "loss averaged over ranks"


def loss(logits, batch):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def reference():
    return Transformer()


def parallel(group):
    return cut(reference(), group)


def parallel_loss(logits, batch, group):
    own = slice_of(logits[:, :-1], 1, group).flatten(0, 1)
    labels = slice_of(batch[:, 1:], 1, group).flatten()
    return reduce_from_ranks(F.cross_entropy(own, labels), group) / 2
