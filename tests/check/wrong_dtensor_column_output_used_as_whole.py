"""The head keeps its columns, and the loss takes them for the whole vocabulary."""

from dtensor_plans import BLOCKS, planned
from plain_models import Transformer, next_token_loss, tokens
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.nn import functional as F

MODULE = ""
KIND = "sum missing"
ALSO = ("head",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return planned(reference(), group, BLOCKS | {"head": ColwiseParallel()})


def parallel_loss(logits, batch, group):
    labels = batch[:, 1:].flatten() % logits.shape[-1]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
