"""fully_shard alone, whose parameters are cut along their rows."""

from plain_models import Transformer, next_token_loss, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    mesh = init_device_mesh("cpu", (group.size(),))
    return fully_shard(reference(), mesh=mesh)
