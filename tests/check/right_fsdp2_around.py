"""fully_shard over the data-parallel dim of a 2 x 2 mesh, around DTensor's tensor parallelism."""

from dtensor_plans import BLOCKS
from plain_models import Transformer, next_token_loss, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

batch, loss, degree = tokens, next_token_loss, 4


def reference():
    return Transformer()


def parallel(group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(reference(), mesh["tp"], BLOCKS)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])
