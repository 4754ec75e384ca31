"""`checked()` on cut tensors: a rule that is wrong is named, with the line that called it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import shardproof as sp
from places import Pool
from shardproof.axis import Axis
from shardproof.cut import rules, tensor
from shardproof.cut.spec import Region
from shardproof.cut.tensor import cut_tensor
from shardproof.errors import CheckError
from shardproof.ops.unit_moves import held_part
from shardproof.scheme import Scheme
from shardproof.units import CutDim, Shared, Units, blocks_of

assert rules  # every rule is there once this is imported
FULL = torch.arange(1.0, 31.0).reshape(3, 10)


def cut(axis: Axis) -> Any:
    """(3, 10), the columns cut in two blocks of five features."""
    along = CutDim(Shared(Units("features", 5), 4, axis.size), blocks_of([*range(5)] * 2))
    region = Region(axis, Scheme())
    local = held_part(FULL, 1, region.place(along, "up")).clone().requires_grad_()
    return cut_tensor(local, region.spec((3, 10), 1, along), "up")


def step(axis: Axis) -> Tensor:
    with sp.checked():
        return (cut(axis) * 2).sum()


def test_rules_that_are_right_pass(pool: Pool) -> None:
    for degree in (1, 2, 3):
        for total in pool(degree, "threads").run(step):
            assert float(total.detach()) == float(FULL.sum() * 2)


def test_a_rule_that_is_wrong_is_named(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tensor.RULES["mul"]

    def wrong(*given: Any) -> Any:
        y = right(*given)
        return cut_tensor(y.local * (1 + y.spec.region.rank), y.spec, y.who)

    monkeypatch.setitem(tensor.RULES, "mul", wrong)

    def work(axis: Axis) -> None:
        with pytest.raises(CheckError, match="mul of cut tensors is wrong: ") as raised:
            step(axis)
        assert "differs by" in str(raised.value)
        assert "return (cut(axis) * 2).sum()" in str(raised.value)
        assert "from the weight of 'up'" in str(raised.value)

    pool(2, "threads").run(work)
