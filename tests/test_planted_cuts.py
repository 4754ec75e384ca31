"""Faults planted in the rules of cut tensors: `checked()` names each, and so does the prover."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from places import Pool
from shardproof.axis import Axis
from shardproof.cut import moves
from shardproof.errors import CheckError, RankError, ShapeError
from shardproof.ops import unit_ops
from shardproof.ops.unit_sums import fold
from watched_models import Gated, Grouped, NormedHeads

DEGREES = (1, 2, 3)


class Stack(nn.Module):
    """A layer that nothing is wrong with, then the one that the fault is planted in."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = Gated(), second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


@dataclass(frozen=True)
class Planted:
    """A fault, and what must be said of it.

    Attributes:
        model: in whose second layer it shows.
        plant: by a monkeypatch.
        degree: at which it shows.
        operation: that is named.
        line: of the model's code, a part of it.
        says: of the message, a part of it.
    module: whose code that is.
    """

    model: Callable[[], nn.Module]
    plant: Callable[[pytest.MonkeyPatch], None]
    degree: int
    operation: str
    line: str
    says: str
    module: str = "second"


def wrong_intersection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that holds query heads of two groups gives each the other's key-value head."""
    right = unit_ops.serve

    def wrong(x: Tensor, dim: int, place: Any, target: Any, index: Any) -> Tensor:
        y = right(x, dim, place, target, index)
        return y.flip(dim) if place.axis.size == 3 and place.axis.rank == 1 else y

    monkeypatch.setattr(unit_ops, "serve", wrong)


def partial_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over the cut dim is this rank's part of it."""

    def wrong(x: Tensor, dim: int, place: Any, *, keepdim: bool = False) -> Tensor:
        return fold(x, (dim,), keepdim=keepdim, place=place)

    monkeypatch.setattr(unit_ops, "sum_cut", wrong)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def owner_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a key-value head has its owner's part twice, where others hold it too."""
    right = unit_ops.serve

    def wrong(x: Tensor, dim: int, place: Any, target: Any, index: Any) -> Tensor:
        cut = place.cut_dim
        is_shared = any(len(cut.held(r)) > len(cut.owned(r)) for r in range(place.axis.size))
        return right(_Twice.apply(x) if is_shared else x, dim, place, target, index)

    monkeypatch.setattr(unit_ops, "serve", wrong)


def stale_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of a view is found again without a look at the degree."""
    right, kept = moves.find, {}

    def wrong(func: Any, name: str, spec: Any, args: Any, kwargs: Any) -> Any:
        key = (func, name, spec.shape, spec.dim, repr(args))
        if key not in kept:
            kept[key] = right(func, name, spec, args, kwargs)
        return kept[key]

    monkeypatch.setattr(moves, "find", wrong)


PLANTED = {
    "a wrong intersection of two cuts": Planted(
        Grouped,
        wrong_intersection,
        3,
        "scaled_dot_product_attention",
        "F.scaled_dot_product_attention(q, k, v)",
        "differs by",
    ),
    "a partial taken for whole": Planted(
        NormedHeads, partial_for_whole, 2, "mean", "q.pow(2).mean(-1", "its result differs by"
    ),
    "an owner counted twice": Planted(
        Grouped, owner_twice, 3, "scaled_dot_product_attention", "F.scaled", "a gradient of its"
    ),
    "a stale recipe of another degree": Planted(
        Grouped, stale_recipe, 2, "chunk", "both.chunk(2, -1)", "has a part of shape", "first"
    ),
}
EVERY = pytest.mark.parametrize("fault", PLANTED)


@dataclass(frozen=True)
class SetUp:
    """A model, its plans made before anything is planted, and a batch."""

    model: nn.Module
    plans: dict[int, Any]
    x: Tensor

    @staticmethod
    def of(make: Callable[[], nn.Module]) -> "SetUp":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Stack(make())
            x = torch.randn(2, 5, 12)
        return SetUp(model, {d: sp.plan(model, degree=d, inputs=(x,)) for d in DEGREES}, x)

    def build(self, axis: Axis | None) -> nn.Module:
        model = copy.deepcopy(self.model)
        return model if axis is None else sp.parallelize(model, self.plans[axis.size], axis)

    def prove(self) -> Any:
        target = torch.zeros_like(self.x)
        options: dict[str, Any] = {"degrees": DEGREES, "audit_creation": False}
        return sp.prove(self.build, F.mse_loss, (self.x, target), **options)


@pytest.mark.parametrize("make", [Grouped, NormedHeads])
def test_nothing_is_said_where_nothing_is_planted(make: Callable[[], nn.Module]) -> None:
    report = SetUp.of(make).prove()
    assert report.identical, report.verdict()
    assert report.agrees_with_torch, report.verdict()
    assert report.as_dict()["cases"][0]["where"] is None


@EVERY
def test_checked_names_it(fault: str, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = PLANTED[fault]
    given = SetUp.of(planted.model)
    planted.plant(monkeypatch)

    def work(axis: Axis) -> str:
        model = given.build(axis)
        try:
            with sp.checked():
                model(given.x).sum().backward()
        except CheckError as error:
            return str(error) if error.operation == planted.operation else error.operation
        except RankError:
            return ""  # another rank named it, and did not come
        return "nothing"

    if fault.startswith("a stale"):
        pool(1, "threads").run(lambda axis: given.build(axis)(given.x))
    said = [each for each in pool(planted.degree, "threads").run(work) if each]
    assert said
    for each in said:
        assert each.startswith(f"{planted.operation} of cut tensors is wrong: "), each
        assert planted.line in each, each
        assert planted.says in each, each


@EVERY
def test_the_prover_names_it(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = PLANTED[fault]
    given = SetUp.of(planted.model)
    planted.plant(monkeypatch)
    if fault.startswith("a stale"):
        with pytest.raises((RankError, ShapeError)) as raised:
            given.prove()
        said = raised.value.__notes__[-1]
    else:
        report = given.prove()
        assert not report.proved
        where = report.as_dict()["cases"][0]["where"]
        assert (where["module"], where["operation"]) == (planted.module, planted.operation)
        assert where["degree"] == planted.degree
        assert planted.line in where["line"]
        said = report.verdict()
        start = f"At degree {planted.degree} the fault begins in module 'second'"
        assert f"  where: {start}" in str(report)
    assert (
        f"At degree {planted.degree} the fault begins in module {planted.module!r}, in the "
        f"operation {planted.operation} at " in said
    ), said
    assert planted.says in said
