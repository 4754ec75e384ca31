"""DistributedDataParallel over two pairs of ranks, around hand-written tensor parallelism."""

from parts import cut
from plain_models import Transformer, next_token_loss, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

batch, loss, degree = tokens, next_token_loss, 4


def reference():
    return Transformer()


def parallel(group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = cut(reference(), mesh["tp"].get_group())
    return DistributedDataParallel(model, process_group=mesh["dp"].get_group())
