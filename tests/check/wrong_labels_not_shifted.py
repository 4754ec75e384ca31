"""The labels are not shifted against the logits."""

from parts import cut
from plain_models import Transformer, next_token_loss, tokens
from torch.nn import functional as F

MODULE = ""
KIND = "labels shifted"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return cut(reference(), group)


def parallel_loss(logits, batch, group):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, :-1].flatten())
