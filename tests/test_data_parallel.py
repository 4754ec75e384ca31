"""Data parallelism over the ranks of an axis would mix parts of a weight: refused on all ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from gated_model import PLAN, Model
from invariance import normal
from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.plans.apply import parallelize
from shardproof.ranks import launch

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")


def wrap(model: nn.Module, how: str, mesh: Any) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model, process_group=mesh.get_group())
    if how == "fsdp":
        return FullyShardedDataParallel(
            model, process_group=mesh.get_group(), device_id=torch.device("cpu")
        )
    return fully_shard(model, mesh=mesh)


WAYS = {"ddp": "DistributedDataParallel", "fsdp": "FullyShardedDataParallel"}
WAYS |= {"fully_shard": "fully_shard"}


def over_the_axis(_: Axis) -> dict[str, str]:
    """What is said of each way, on one rank."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    said = {}
    for how in WAYS:
        model = parallelize(Model(), PLAN, Axis.from_mesh(mesh["tp"]))
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(UsageError) as raised:
            wrap(model, how, mesh["tp"])
        for mine, kept in zip(model.parameters(), before, strict=True):
            assert torch.equal(mine, kept), how
        said[how] = str(raised.value)
    return said


def test_a_group_of_ranks_with_different_parts_is_refused_on_all() -> None:
    for said in launch(over_the_axis, degree=2, engine="processes", threads=1, timeout=60):
        assert set(said) == set(WAYS)
        for how, text in said.items():
            assert text.startswith(f"{WAYS[how]} would take the parts of "), how
            assert "on ranks [0, 1] of axis 'tp'" in text, how


def on_a_2d_mesh(_: Axis) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize(Model(), PLAN, Axis.from_mesh(mesh["tp"]))
    fully_shard(model, mesh=mesh["dp"])
    with torch.no_grad():
        return model(normal(8, 6, seed=90))


def test_ranks_with_the_same_part_may_share_it() -> None:
    with torch.no_grad():
        wanted = Model()(normal(8, 6, seed=90))
    for y in launch(on_a_2d_mesh, degree=4, engine="processes", threads=1, timeout=60):
        assert_close(y, wanted, rtol=1e-4, atol=1e-6)
