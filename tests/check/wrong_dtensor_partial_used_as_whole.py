"""The down projection gives its Partial output by to_local."""

from dtensor_plans import BLOCKS, planned
from plain_models import Transformer, next_token_loss, tokens
from torch.distributed.tensor import Partial
from torch.distributed.tensor.parallel import RowwiseParallel

MODULE = "layers.0.mlp.down"
KIND = "sum missing"
ALSO = ("layers.0.mlp",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    down = RowwiseParallel(output_layouts=Partial())
    return planned(reference(), group, BLOCKS | {"layers.*.mlp.down": down})
