"""A cut weight is never made whole: an operation that wants it is refused, or planned around."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from places import Pool
from shardproof.axis import Axis
from shardproof.cut.tensor import CutTensor
from shardproof.errors import PlanError, UsageError
from shardproof.plans.watched_plan import WatchedPlan

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
NAMED = {"up": "colwise", "down": "rowwise"}


class Pair(nn.Module):
    """Two linears, of which the code between reads the first one's weight."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 36), nn.Linear(36, 12)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.between(self, self.up(x)))
        return y


# Of a weight, of its transpose, of its memory by another name; with a gradient and without.
WHOLE_WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linalg_svdvals": lambda m, h: h + torch.linalg.svdvals(m.up.weight).sum(),
    "linalg_det": lambda m, h: h + torch.linalg.det(m.up.weight.t()[:, :12]),
    "linalg_matrix_rank": lambda m, h: h * torch.linalg.matrix_rank(m.up.weight.detach()),
    "linalg_pinv": lambda m, h: h + torch.linalg.pinv(m.up.weight.data).sum(),
    "embedding_bag": lambda m, h: h + F.embedding_bag(torch.zeros(1, 2).long(), m.up.weight).sum(),
    "embedding": lambda m, h: h + F.embedding(torch.zeros(1).long(), m.up.weight, max_norm=1).sum(),
}


@pytest.mark.parametrize("name", WHOLE_WEIGHTS)
def test_is_refused_where_a_plan_names_the_weight(name: str, pool: Pool) -> None:
    """By the operation and the weight, on every rank; at plan time if there are inputs."""

    def run(axis: Axis) -> str:
        model = sp.parallelize(copy.deepcopy(pair), NAMED, axis)
        with pytest.raises(UsageError) as caught:
            model(X)
        return str(caught.value)

    pair = Pair(WHOLE_WEIGHTS[name])
    for said in pool(2, "threads").run(run):
        assert said.startswith("'up.weight' would be whole on every rank"), said
        assert f"needs all of it ({name})" in said
        assert "Leave the weight whole" in said
    with pytest.raises(PlanError, match=rf"'up.weight' would be whole .* \({name}\)"):
        sp.plan(pair, NAMED, degree=2, inputs=X)


MOVED: dict[str, Callable[[Any], Any]] = {
    "double": lambda m: m.double(),
    "copy": copy.deepcopy,
    "moved once more": lambda m: m.double().float(),
}


@pytest.mark.parametrize("how", MOVED)
def test_is_refused_after_the_weights_have_been_moved(how: str, pool: Pool) -> None:
    def run(axis: Axis) -> str:
        cut = sp.parallelize(copy.deepcopy(pair), NAMED, axis)
        with pytest.raises(UsageError):
            cut(X)
        model = MOVED[how](cut)
        with pytest.raises(UsageError) as caught:
            model(X.to(next(model.parameters()).dtype))
        return str(caught.value)

    name = "linalg_pinv" if how != "copy" else "linalg_svdvals"
    pair = Pair(WHOLE_WEIGHTS[name])
    assert "would be whole on every rank" in pool(2, "threads").run(run)[0]


def test_memory_of_a_weight_that_is_gone_is_no_weight(pool: Pool) -> None:
    """A new parameter takes the place of one; another tensor may get the old one's memory."""

    def run(axis: Axis) -> bool:
        model: Any = sp.parallelize(copy.deepcopy(pair), NAMED, axis)
        region = model.up.forward.args[1]
        old = model.down.weight
        part = old.detach()
        assert region.weight_of(part) == "down.weight"
        model.down.weight = nn.Parameter(part.clone())
        del old
        return region.weight_of(part) is None

    pair = Pair(lambda m, h: h.relu())
    assert pool(2, "threads").run(run) == [True, True]


def test_whole_of_a_weight_is_refused(pool: Pool) -> None:
    def run(axis: Axis) -> str:
        model = sp.parallelize(copy.deepcopy(pair), NAMED, axis)
        with pytest.raises(UsageError) as caught:
            model(X)
        return str(caught.value)

    pair = Pair(lambda m, h: h + m.up.weight.whole().sum())
    assert pool(2, "threads").run(run)[0].startswith("'up.weight' would be whole on every rank")


@pytest.mark.parametrize("name", WHOLE_WEIGHTS)
def test_stays_whole_where_a_forward_is_watched(name: str, pool: Pool) -> None:
    """At every degree alike; same bits, and the numbers of plain torch."""

    def run(axis: Axis) -> list[Tensor]:
        model = sp.parallelize(copy.deepcopy(pair), plans[axis.size], axis)
        y = model(X)
        y = y.whole() if isinstance(y, CutTensor) else y
        y.square().sum().backward()
        assert model.up.weight.shape == (36, 12)
        return [y.detach(), model.up.weight.grad]

    torch.manual_seed(0)
    pair = Pair(WHOLE_WEIGHTS[name])
    plans = {degree: sp.plan(pair, degree=degree, inputs=X) for degree in (1, 2, 3)}
    for plan in plans.values():
        assert isinstance(plan, WatchedPlan)
        assert plan.whole["up.weight"].startswith(f"'{name}' needs all"), plan.whole
        assert plan.rehearsal.whole_weights == ()
        assert "down.weight" in plan.cuts
    true = copy.deepcopy(pair)
    y = true(X)
    y.square().sum().backward()
    one, *others = [found for degree in plans for found in pool(degree, "threads").run(run)]
    for mine, expected in zip(one, (y.detach(), true.up.weight.grad), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    for other in others:
        assert all(map(torch.equal, other, one))


def test_a_plan_ends_where_two_weights_make_one() -> None:
    """Of two factors one stays whole: it is cut along no other dim instead."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(40, 3)), nn.Parameter(torch.randn(3, 12))
            self.down = nn.Linear(40, 12)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(F.linear(x, self.u @ self.v).relu())
            return y

    plan = sp.plan(LowRank(), degree=2, inputs=X)
    assert isinstance(plan, WatchedPlan)
    assert not set(plan.cuts) & set(plan.whole)
