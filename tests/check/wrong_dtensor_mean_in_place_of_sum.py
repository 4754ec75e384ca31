"""The embedding is reduced by the mean of DTensor."""

from dtensor_plans import BLOCKS, planned
from plain_models import Transformer, next_token_loss, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional as F

MODULE = "embedding"
KIND = "averaged, not summed"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Embedding(nn.Module):
    def __init__(self, plain, mesh):
        super().__init__()
        self.mesh, self.rows = mesh, plain.num_embeddings // mesh.size()
        self.first = self.rows * mesh.get_local_rank()
        end = self.first + self.rows
        self.weight = nn.Parameter(plain.weight[self.first : end].detach().clone())

    def forward(self, x):
        local = x - self.first
        is_mine = (local >= 0) & (local < self.rows)
        part = F.embedding(local.where(is_mine, 0), self.weight) * is_mine[..., None]
        whole = DTensor.from_local(part, self.mesh, [Partial("avg")], run_check=False)
        return whole.redistribute(placements=[Replicate()]).to_local()


def parallel(group):
    mesh = init_device_mesh("cpu", (group.size(),))
    model = reference()
    model.embedding = Embedding(model.embedding, mesh)
    return planned(model, group, BLOCKS)
