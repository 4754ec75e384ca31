"""ColwiseParallel cuts a fused query-key-value weight as one block."""

from dtensor_plans import planned
from plain_models import FusedAttention, Transformer, next_token_loss, tokens
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

batch, loss = tokens, next_token_loss
MODULE = "layers.0.attention.qkv"
KIND = "fused weight cut as one block"
ALSO = ("layers.0.attention",)


def reference():
    return Transformer(attention=FusedAttention)


def parallel(group):
    plan = {"layers.*.attention.qkv": ColwiseParallel(), "layers.*.attention.o": RowwiseParallel()}
    return planned(reference(), group, plan)
