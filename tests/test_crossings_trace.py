"""What observers are told of unit_ops, and ranks as processes."""

from typing import Any

import pytest
import torch

from cut_dims import DIMS, leaf
from invariance import bits_equal, normal
from places import Pool
from shardproof.axis import Axis
from shardproof.ops import unit_ops
from shardproof.ops.unit_ops import Entering, UnitSplit, held_part
from shardproof.ranks import launch


def block(axis: Axis, place: UnitSplit) -> dict[str, torch.Tensor]:
    """One step through every kind of crossing."""
    entering, x = Entering(), leaf(normal(5, 19, seed=1))
    fused = leaf(held_part(normal(place.size, 19, seed=2), 0, place))
    table = leaf(held_part(normal(place.size, 19, seed=3), 0, place))
    scale = leaf(normal(1, seed=4))
    z = x + unit_ops.lookup_rows(table, torch.arange(5), place)
    y = unit_ops.column(z, fused, None, place, entering=entering)
    y = y + unit_ops.column(z, fused, None, place, entering=entering)
    y = y * unit_ops.spread(scale, y.shape, -1, place)
    y = y * unit_ops.softmax_cut(y, 1, place)
    value, _ = unit_ops.max_cut(y, 1, place)
    h = unit_ops.row(y, fused, None, place, is_transposed=True)
    total = h.sum() + value.sum() + unit_ops.mean_cut(y, 1, place).sum()
    total = total + unit_ops.contract(y[None], table[None], place).sum()
    total.backward()
    grads = {"x": x.grad, "scale": scale.grad}
    for name, weight in (("fused", fused), ("table", table)):
        grads[name] = unit_ops.gather(weight.grad, 0, place)
    return {"total": total.detach()} | {name: g for name, g in grads.items() if g is not None}


@pytest.mark.parametrize("name", ["fused", "features"])
def test_a_trace_has_every_collective_and_changes_no_bit(name: str) -> None:
    def step(axis: Axis) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        found = block(axis, DIMS[name].place(axis))
        return found, axis.transport.ledger.as_dict()

    plain = launch(step, degree=3)
    traced = launch(step, degree=3, trace=True)
    assert traced.trace is not None
    for rank, ((mine, calls), (theirs, counted)) in enumerate(zip(plain, traced, strict=True)):
        assert calls == counted
        assert all(bits_equal(mine[key], theirs[key]) for key in mine)
        assert traced.trace.collectives(rank) == counted
        told = {(step.operation, step.module) for step in traced.trace.ranks[rank]}
        for operation in ("product", "lookup", "sum of rows", "all_reduce", "all_gather"):
            assert (operation, "layer") in told


def test_processes_have_the_bits_of_threads(pool: Pool) -> None:
    def step(axis: Axis) -> dict[str, torch.Tensor]:
        return block(axis, DIMS["fused"].place(axis))

    for found in pool(3, "processes").run(step):
        for theirs in pool(2, "threads").run(step):
            assert all(bits_equal(found[key], theirs[key]) for key in theirs)
