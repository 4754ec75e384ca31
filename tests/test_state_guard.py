"""State that one rank's optimizer gave is not loaded by another rank's."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from invariance import bits_equal, normal
from shardproof.axis import Axis
from shardproof.errors import LayoutError
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, RowParallel
from shardproof.ranks import launch

PLAN = {"0": ColumnParallel(), "2": RowParallel()}


torch.manual_seed(0)  # once: ranks as threads share the generator
PLAIN = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))


def trained(axis: Axis, optimizer: type[torch.optim.Optimizer]) -> tuple[nn.Module, Any]:
    model = parallelize(copy.deepcopy(PLAIN), PLAN, axis)
    made = optimizer(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    step(model, made)
    return model, made


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(normal(7, 6, seed=1)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RAdam])
def test_the_state_of_rank_0_is_refused_on_other_ranks(optimizer: Any) -> None:
    for degree in (2, 4):
        saved, *_ = launch(lambda axis: trained(axis, optimizer)[1].state_dict(), degree=degree)

        def work(axis: Axis, saved: Any = saved) -> str:
            _, made = trained(axis, optimizer)
            if axis.rank == 0:
                made.load_state_dict(saved)
                return ""
            with pytest.raises(LayoutError) as raised:
                made.load_state_dict(saved)
            return str(raised.value)

        _, *others = launch(work, degree=degree, engine="threads")
        for rank, said in enumerate(others, start=1):
            assert f"it is that of rank, size 0, {degree} of axis" in said
            assert f"this is rank, size {rank}, {degree} of axis" in said


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_every_rank_resumes_from_its_own_state(degree: int) -> None:
    def work(axis: Axis) -> bool:
        model, made = trained(axis, torch.optim.AdamW)
        saved = copy.deepcopy((made.state_dict(), model.state_dict()))
        step(model, made)
        again, other = trained(axis, torch.optim.AdamW)
        again.load_state_dict(saved[1])
        other.load_state_dict(saved[0])
        step(again, other)
        return all(
            bits_equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
        )

    assert all(launch(work, degree=degree, engine="threads"))


def test_a_state_of_another_degree_or_of_a_plain_model_is_named() -> None:
    saved, *_ = launch(lambda axis: trained(axis, torch.optim.SGD)[1].state_dict(), degree=2)

    def work(axis: Axis) -> str:
        with pytest.raises(LayoutError) as raised:
            trained(axis, torch.optim.SGD)[1].load_state_dict(saved)
        return str(raised.value)

    assert "and this is rank, size 0, 1" in launch(work, degree=1)[0]
    assert "and this is rank, size 0, 3 of axis" in launch(work, degree=3)[0]
