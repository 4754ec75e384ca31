"""What `prove` is given: everything that makes no sense is one clear error before any run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from planted import IN, OUT, batch, block_builder, expect_proved, linear
from shardproof.axis import Axis
from shardproof.errors import DegreeError, UsageError
from shardproof.mistakes.trainings import BATCH


def never(axis: Axis | None) -> nn.Module:
    raise AssertionError("something ran")


def prove(given: Any = None, **options: Any) -> Any:
    return sp.prove(never, F.mse_loss, batch() if given is None else given, **options)


X = torch.ones(2, IN)
WAY_OUT = r"Give \(inputs, target\), inputs being a tensor or a tuple of tensors"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (X, "the batch is a Tensor, not a pair"),  # of two rows: it would unpack
        ((X,), "the batch is a tuple of 1, not a pair"),
        ((X, X, X), "the batch is a tuple of 3, not a pair"),
        ({"x": X, "y": X}, "the batch is a dict, not a pair"),
        (({"x": X}, X), "an input of the batch is of type dict, not a tensor"),
        (((X, 3), X), "an input of the batch is of type int, not a tensor"),
        ((X, [1.0]), "the target of the batch is of type list, not a tensor"),
    ],
)
def test_a_batch_that_is_no_pair_of_tensors(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"{message}. {WAY_OUT}"):
        prove(given)


def test_degrees_that_are_no_list() -> None:
    for degrees in (2, "1,2", None):
        with pytest.raises(UsageError, match=f"degrees={degrees!r} is not a list of degrees"):
            prove(degrees=degrees)


@pytest.mark.parametrize("degree", [2.0, "2", None, True])
def test_a_degree_that_is_no_whole_number(degree: Any) -> None:
    with pytest.raises(DegreeError, match=f"degree {degree!r} is not a whole number. Use 1"):
        prove(degrees=(1, degree))


def test_a_degree_that_is_not_positive() -> None:
    with pytest.raises(DegreeError, match="degree -2 is not a positive number"):
        prove(degrees=(1, -2))


@pytest.mark.parametrize("steps", [0, -1, 1.5, "2", None, True])
def test_steps_that_are_no_positive_number(steps: Any) -> None:
    with pytest.raises(UsageError, match=f"steps={steps!r} is not a positive whole number"):
        prove(steps=steps)


class Returning(nn.Module):
    """A linear layer whose output comes wrapped."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = linear(IN, OUT, seed=1), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda y: (y, y), "tuple"),
        (lambda y: SimpleNamespace(logits=y), "SimpleNamespace"),
        (lambda y: None, "NoneType"),
    ],
)
def test_a_module_that_does_not_return_a_tensor(wrap: Any, name: str) -> None:
    built = []

    def build(axis: Axis | None) -> nn.Module:
        built.append(axis)
        return Returning(wrap)

    with pytest.raises(UsageError, match=f"Returning returns a {name}, and a proof needs one tens"):
        sp.prove(build, lambda output, target: output, batch(), degrees=(1, 2))
    assert built == [None], "the reference shows it before any rank starts"


def test_inputs_may_come_in_a_list() -> None:
    x, target = batch()
    expect_proved(
        sp.prove(block_builder(), F.mse_loss, ([x], target), degrees=(1, 2), audit_creation=False)
    )


def test_a_loss_that_writes_into_its_target_writes_into_its_own_copy() -> None:
    x, target = batch()
    before = target.clone()

    def loss(output: Tensor, given: Tensor) -> Tensor:
        return F.mse_loss(output, given.mul_(2))

    report = sp.prove(
        block_builder(), loss, (x, target), degrees=(1, 3), steps=2, audit_creation=False
    )
    expect_proved(report)
    assert torch.equal(target, before)
    assert len(target) == BATCH
