"""The prover on a fused weight that is cut by blocks, and on one whose shared head is spoiled."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardproof as sp
from blocks import HEAD, fused
from invariance import normal
from shardproof.axis import Axis
from shardproof.block_layout import BlockLayout, cut_layout
from shardproof.index_runs import take
from shardproof.layers.cut_module import cut_parameters
from shardproof.layers.registry import record_of
from shardproof.leaves import Layout
from shardproof.ops.unit_moves import joined
from shardproof.ops.unit_split import UnitSplit
from shardproof.scheme import Scheme

ROWS = 10 * HEAD
BATCH = (normal(64, 6, seed=1), normal(64, ROWS, seed=2))


class Whole(torch.autograd.Function):
    """A parameter as the whole forward, its gradient as what is held backward."""

    spoils = False

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, layout: BlockLayout, axis: Axis) -> Tensor:
        ctx.layout, ctx.rank = layout, axis.rank
        return joined(
            parameter, layout.dim or 0, UnitSplit(axis, layout.along, Scheme()), "forward"
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        part = take(grad, 0, ctx.layout.held_runs).clone()
        if Whole.spoils and ctx.layout.other_places:
            part[ctx.layout.other_places[0]] *= 2
        return part, None, None


def gathered(parameter: nn.Parameter, layout: Layout, module: nn.Module, name: str) -> Tensor:
    return Whole.apply(parameter, layout, record_of(module).axis)


def build(axis: Axis | None) -> nn.Module:
    model = nn.Linear(6, ROWS)
    with torch.no_grad():
        model.weight.copy_(normal(ROWS, 6, seed=3))
        model.bias.copy_(normal(ROWS, seed=4))
    if axis is None:
        return model
    layouts = {
        name: cut_layout(tuple(each.shape), axis.rank, dim=0, along=fused(axis.size))
        for name, each in model.named_parameters()
    }
    return cut_parameters(model, layouts, axis=axis, scheme=Scheme(), wrap=gathered)


def report() -> Any:
    return sp.prove(
        build, F.mse_loss, BATCH, degrees=(1, 3, 5), optimizer=torch.optim.AdamW, threads=1
    )


def test_a_fused_weight_is_proved() -> None:
    found = report()
    assert found.proved, found.verdict()
    tensors = {tensor.name for tensor in found.cases[0].tensors}
    assert {"weight.grad", "bias.grad", "weight.exp_avg", "bias.exp_avg_sq"} <= tensors


def test_copies_of_a_shared_head_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Whole, "spoils", True)
    found = report()
    assert not found.proved
    assert "shared unit 0 of rank 1 differs from that of rank 0" in found.verdict()
