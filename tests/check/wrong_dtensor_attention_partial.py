"""The output projection of the attention stays Partial."""

from dtensor_plans import BLOCKS, planned
from plain_models import Transformer, next_token_loss, tokens
from torch.distributed.tensor import Partial
from torch.distributed.tensor.parallel import RowwiseParallel

MODULE = "layers.0.attention.o"
KIND = "sum missing"
ALSO = ("layers.0.attention",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    o = RowwiseParallel(output_layouts=Partial())
    return planned(reference(), group, BLOCKS | {"layers.*.attention.o": o})
