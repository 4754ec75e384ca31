"""Where operations are right and the model is not: the first module that gives something else."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from shardproof.axis import Axis
from shardproof.prover.fault_location import ModuleTensor, RankSearch, first_different_module
from watched_models import Gated

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


class Scaled(nn.Module):
    """What it gets times a number that is no parameter; backward times another."""

    def __init__(self) -> None:
        super().__init__()
        self.forth, self.back = 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.forth
        if self.back != 1 and y.requires_grad:
            y.register_hook(lambda grad: grad * self.back)
        return y


class Tower(nn.Module):
    """Three cut layers, with a scale before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Gated(), Gated(), Gated()
        self.scale = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.scale(self.second(x))
        return x + self.third(x)


def proved(change: Any, *, engine: str = "threads", degrees: tuple[int, ...] = (1, 2)) -> Any:
    """A proof of a tower that `change` changes on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tower()

    def build(axis: Axis | None) -> nn.Module:
        made = copy.deepcopy(model)
        if axis is None:
            return made
        made = sp.parallelize(made, None, axis, inputs=(X,))
        change(made, axis)
        return made

    target = torch.zeros_like(X)
    return sp.prove(
        build, F.mse_loss, (X, target), degrees=degrees, engine=engine, audit_creation=False
    )


def where_of(report: Any) -> Any:
    """What the JSON document says."""
    return json.loads(json.dumps(report.as_dict()))["cases"][0]["where"]


def test_nothing_wrong() -> None:
    report = proved(lambda model, axis: None)
    assert report.proved, report.verdict()
    assert where_of(report) is None


def test_the_first_module_whose_bits_differ_is_named() -> None:
    def change(model: Any, axis: Axis) -> None:
        model.scale.forth = 1 + axis.size / 16

    report = proved(change)
    where = where_of(report)
    assert (where["degree"], where["module"], where["operation"]) == (2, "scale", "")
    assert where["detail"].startswith("output 0 differs from that at degree 1 by ")
    begins = "At degree 2 the fault begins in module 'scale': "
    assert f"{begins}output 0 differs from" in report.verdict()
    assert f"\n  where: {begins}" in str(report)


def test_one_rank_that_differs_is_named() -> None:
    def change(model: Any, axis: Axis) -> None:
        if axis.rank == 1:
            model.third.register_forward_hook(lambda module, args, y: y * 1.5)

    where = where_of(proved(change))
    assert where["module"] == "third"


def test_a_whole_tensor_that_one_rank_has_otherwise() -> None:
    right, wrong = torch.ones(3), torch.tensor([1.0, 1.0, 1.5])

    def search(value: Tensor) -> RankSearch:
        part = ModuleTensor("up", "output 0", torch.ones(2))  # another shape: one rank's part
        return RankSearch(None, (part, ModuleTensor("norm", "output 0", value)))

    others = search(right).tensors

    def told(*values: Tensor, is_close: bool = False) -> str:
        options: Any = {"degree": 2, "other": "at degree 1", "is_close": is_close}
        return str(first_different_module([search(each) for each in values], others, **options))

    begins = "At degree 2 the fault begins in module 'norm': "
    start = f"{begins}output 0 differs from that at degree 1 by "
    assert told(right, wrong) == f"{start}0.5 on rank 1"
    assert told(wrong, wrong) == f"{start}0.5"
    assert told(right, right) == "None"
    assert told(right, right * (1 + 1e-6)) != "None"
    assert told(right, right * (1 + 1e-6), is_close=True) == "None"


def test_a_gradient_that_differs_is_named() -> None:
    def change(model: Any, axis: Axis) -> None:
        model.scale.back = 1 + axis.size / 16

    where = where_of(proved(change))
    assert where["module"] == "scale"
    assert where["detail"].startswith("the gradient of output 0 differs from that at degree 1 by ")


@pytest.mark.parametrize(("engine", "degrees"), [("threads", (1, 2)), ("processes", (2,))])
def test_what_all_degrees_have_in_common_is_compared_with_plain_torch(
    engine: str, degrees: tuple[int, ...]
) -> None:
    def change(model: Any, axis: Axis) -> None:
        model.scale.forth = 1.25

    report = proved(change, engine=engine, degrees=degrees)
    assert report.identical
    where = where_of(report)
    assert where["module"] == "scale"
    assert where["detail"].startswith("output 0 differs from that of plain PyTorch by ")
