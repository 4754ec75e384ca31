"""Tensor parallelism inside data parallelism: one 2 x 2 mesh, plain DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from gated_model import PLAN, Model
from invariance import bits_equal, normal
from shardproof import comm
from shardproof.axis import Axis
from shardproof.optim import clip_grad_norm_, layouts_of
from shardproof.plans.apply import parallelize
from shardproof.ranks import launch

Tensors = dict[str, Tensor]
ROWS = 8


def batch() -> tuple[Tensor, Tensor]:
    return normal(ROWS, 6, seed=90), normal(ROWS, 5, seed=91)


def train(model: nn.Module, network: nn.Module, rows: slice, steps: int = 2) -> Tensor:
    """A few clipped steps on some rows; the last norm. `network` is `model`, wrapped or not."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, target = batch()
    norm = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x[rows]), target[rows]).backward()
        norm = clip_grad_norm_(model, 1.0)
        optimizer.step()
    return norm


def whole(model: nn.Module) -> Tensors:
    found = {}
    for name, parameter, layout, axis in layouts_of(model):
        found[name] = parameter.detach().clone()
        if axis is not None and layout.cut is not None and layout.dim is not None:
            found[name] = comm.all_gather(
                found[name], axis, dim=layout.dim, cut=layout.cut, direction="prover"
            )
    return found


def on_a_mesh(_: Axis) -> tuple[tuple[int, int], bool, Tensor, Tensors]:
    """Place in the mesh, whether the replicas began alike, the norm, all weights after training."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    axis = Axis.from_mesh(mesh["tp"], check=True)
    model = parallelize(Model(), PLAN, axis)
    data = mesh["dp"].get_local_rank()
    network = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    share = ROWS // 2
    norm = train(model, network, slice(data * share, (data + 1) * share))
    is_cut = model.layers[0].up_proj.weight.shape != (43, 10)
    return (data, axis.rank), is_cut, norm, whole(model)


def test_tp_composes_with_ddp_on_a_2_x_2_mesh() -> None:
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    alone = Model()
    wanted_norm = train(alone, alone, slice(0, ROWS))
    initial, wanted = whole(Model()), whole(alone)

    results = launch(on_a_mesh, degree=4, engine="processes", threads=1, timeout=60)

    assert [place for place, *_ in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for _, is_cut, norm, weights in results:
        assert is_cut
        assert_close(norm, wanted_norm, rtol=1e-4, atol=1e-6)
        for name, value in wanted.items():
            assert_close(
                weights[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    first = results[0]
    for _, _, norm, weights in results[1:]:
        assert bits_equal(norm, first[2])
        assert all(bits_equal(weights[name], first[3][name]) for name in weights)
    # Negative controls: training moved every weight, and half the batch is another result.
    assert not any(torch.allclose(wanted[name], initial[name], atol=1e-4) for name in wanted)
    half = Model()
    train(half, half, slice(0, ROWS // 2))
    assert not torch.allclose(half.head.weight, alone.head.weight, rtol=1e-4, atol=1e-5)
