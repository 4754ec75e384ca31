"""Planted faults around the layers: labels, divisors, draws, clipping, updates, optimizer state."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from planted import (
    IN,
    FeedForwardBlock,
    batch,
    block_builder,
    expect_bits,
    expect_not_the_same,
    expect_proved,
    expect_torch,
    prove_block,
    prove_clipped,
    sgd,
)
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import NumericsError
from shardproof.mistakes import find_mistake
from shardproof.numerics.sums import sum_squares
from shardproof.optim import gradient_norms
from shardproof.optim.layouts import ParameterLayout
from shardproof.prover import cases
from shardproof.prover.case import CaseRun
from shardproof.prover.cases import matmul_cases as matmul
from shardproof.prover.proof import prove_cases
from shardproof.prover.report import Report


def prove_matmul(degrees: tuple[int, ...] = (1, 2)) -> Report:
    return prove_cases([cases.find_case("matmul-column")], degrees=degrees)


def test_controls_are_proved() -> None:
    expect_proved(prove_matmul())
    expect_proved(prove_clipped(lambda model: sp.clip_grad_norm_(model, 0.5)))
    expect_proved(prove_block(steps=2))


def test_swapped_halves_of_the_label_at_every_degree(monkeypatch: pytest.MonkeyPatch) -> None:
    """`label-halves-swapped`, done before the data is cut: no two degrees differ, torch does."""
    correct = matmul.make_data

    def swapped(trial: CaseRun) -> tuple[Tensor, Tensor]:
        x, label = correct(trial)
        return x, label if trial.axis is None else trial.data(label.roll(4, dims=1))

    monkeypatch.setattr(matmul, "make_data", swapped)
    expect_torch(prove_matmul(), "loss")


def test_wrong_divisor_that_every_degree_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for the batch of 2 that notebook 000 has, wrong for any other."""
    with find_mistake("loss-divided-for-batch-of-two").planted():
        expect_proved(prove_matmul())
        monkeypatch.setattr(matmul, "BATCH", 3)
        expect_torch(prove_matmul(), "loss")


def double_gradient(block: FeedForwardBlock, axis: Axis) -> None:
    block.up.weight.register_hook(lambda grad: 2 * grad)


@pytest.mark.parametrize(
    ("scale", "detail"),
    [
        (1.0, "the largest difference is"),
        (1e-6, "its values are too small for the tolerance (atol 1e-06), and its error against"),
    ],
)
def test_gradient_twice_too_large_at_every_degree(scale: float, detail: str) -> None:
    """Gradients of a mean are small: twice next to nothing is within any absolute tolerance."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return scale * F.mse_loss(output, target)

    expect_proved(prove_block(loss=loss))
    report = prove_block(loss=loss, change=double_gradient)
    expect_torch(report, "up.weight.grad", detail)
    tensors = report.as_dict()["cases"][0]["tensors"]
    assert next(t["name"] for t in tensors if not t["agrees"]) == "up.weight.grad"


def local_norm(model: nn.Module) -> Tensor:
    """The norm of what this rank has."""
    squares = [sum_squares(parameter.grad) for parameter in model.parameters()]
    return torch.stack(squares).sum().sqrt()


def scale_by(model: nn.Module, norm: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad.mul_((0.5 / (norm + 1e-6)).clamp(max=1.0))


def test_replicated_weights_drift_apart_where_each_rank_clips_by_its_own_norm() -> None:
    """`clipped-by-own-norm` where the right norm is logged: the weights themselves must show it."""

    def clip(model: nn.Module) -> Tensor:
        shown = sp.grad_norm(model)
        scale_by(model, shown if model.up.axis.size == 1 else local_norm(model))
        return shown

    expect_bits(
        prove_clipped(clip),
        "front.weight",
        detail="replicas differ at degree 2: rank 1 differs from rank 0",
    )


def test_replicated_gradients_counted_once_per_rank_in_the_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NeMo-RL PR 3788: all ranks agree on a norm that is too large."""
    correct = gradient_norms.sum_squares_of

    def counted(grad: Tensor, place: ParameterLayout) -> Tensor:
        layout, axis, square = place.layout, place.axis, correct(grad, place)
        is_summed = layout.is_replicated and axis is not None
        return comm.all_reduce(square, axis, direction="update") if is_summed else square

    monkeypatch.setattr(gradient_norms, "sum_squares_of", counted)
    report = prove_clipped(lambda model: sp.clip_grad_norm_(model, 0.5))
    expect_bits(report, "grad_norm")
    assert not report.cases[0].first_difference()["detail"], "no replicas differ"


def leave_bias_out(block: FeedForwardBlock, axis: Axis) -> None:
    block.down.bias.is_left_out = axis.rank != 0


def sgd_of_the_rest(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    kept = [parameter for parameter in parameters if not getattr(parameter, "is_left_out", False)]
    return torch.optim.SGD(kept, lr=0.1)


def test_replicated_bias_updated_on_rank_zero_alone() -> None:
    """One owner updates and nobody tells the others; what rank 0 has is right at every degree."""
    expect_not_the_same(
        prove_block(change=leave_bias_out, optimizer=sgd_of_the_rest),
        "down.bias",
        "replicas differ at degree 2: rank 1 differs from rank 0",
    )


def remember_axis(block: FeedForwardBlock, axis: Axis) -> None:
    block.up.weight.axis = axis


@sp.declare_elementwise
class ForgetfulSgd(torch.optim.SGD):
    """Forgets the momentum of the cut weight before its second step, if there are other ranks."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter, state in self.state.items():
            if hasattr(parameter, "axis") and parameter.axis.size > 1:
                state["momentum_buffer"].zero_()
        super().step(closure)


def test_momentum_lost_between_two_steps() -> None:
    """State that is not saved with its shard: the first step after it is right."""
    parts = {
        "change": remember_axis,
        "optimizer": lambda given: ForgetfulSgd(given, lr=0.1, momentum=0.9),
    }
    expect_proved(prove_block(steps=1, **parts))
    expect_bits(prove_block(steps=2, **parts), "step 2: up.weight")


def test_fused_optimizer_is_refused() -> None:
    """Its kernel has a tail as silu has: 56 of 60 updates differed when a parameter was cut."""
    with pytest.raises(NumericsError, match=r"SGD\(fused=True\) gives other bits when a parameter"):
        prove_block(optimizer=lambda given: torch.optim.SGD(given, lr=0.1, fused=True))


class RunningMean(nn.Module):
    """Remembers the mean of what it sees, and how often, as BatchNorm does; passes it on.

    Args:
        own: added to the mean: 0 for one that is right.
        persistent: whether the state dict has the buffers.
    """

    def __init__(self, own: float = 0.0, *, persistent: bool = True) -> None:
        super().__init__()
        self.own = own
        self.register_buffer("mean", torch.zeros(IN), persistent=persistent)
        self.register_buffer("seen", torch.tensor(0), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * (x.detach().mean(0) + self.own))
        self.seen.add_(1)
        return x


def remembering(
    own: Callable[[Axis | None], float] = lambda axis: 0.0, *, persistent: bool = True
) -> Callable[[Axis | None], nn.Module]:
    """`build` of a FeedForwardBlock behind a running mean."""
    build = block_builder()
    return lambda axis: nn.Sequential(RunningMean(own(axis), persistent=persistent), build(axis))


def prove_remembering(build: Callable[[Axis | None], nn.Module]) -> Report:
    return sp.prove(build, F.mse_loss, batch(), degrees=(1, 2), optimizer=sgd, audit_creation=False)


@pytest.mark.parametrize("persistent", [True, False])
def test_running_mean_of_each_rank(persistent: bool) -> None:
    """BatchNorm that saw other samples on every rank: the training itself does not show it."""
    control = prove_remembering(remembering(persistent=persistent))
    expect_proved(control)
    names = [tensor.name for tensor in control.cases[0].tensors]
    assert names.index("0.mean (after forward)") == names.index("output") + 1
    assert {"0.seen (after forward)", "0.mean", "0.seen"} <= {*names}
    build = remembering(lambda axis: float(axis.rank) if axis else 0.0, persistent=persistent)
    expect_not_the_same(
        prove_remembering(build),
        "0.mean (after forward)",
        "replicas differ at degree 2: rank 1 differs from rank 0",
    )


def test_running_mean_that_every_degree_has_wrong() -> None:
    expect_torch(
        prove_remembering(remembering(lambda axis: 1.0 if axis else 0.0)), "0.mean (after forward)"
    )


@sp.declare_elementwise
class CountingSgd(torch.optim.SGD):
    """Counts steps in a buffer of the model, on the first rank alone."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if hasattr(parameter, "counter"):
                parameter.counter.add_(1)


def test_buffer_that_rank_zero_alone_updates_with_the_weights() -> None:
    """An average of the weights that is made after the step."""

    def build(axis: Axis | None) -> nn.Module:
        model = remembering()(axis)
        if axis is None or not axis.rank:
            model[1].front.weight.counter = model[0].seen
        return model

    report = sp.prove(
        build,
        F.mse_loss,
        batch(),
        degrees=(1, 2),
        optimizer=lambda parameters: CountingSgd(parameters, lr=0.1),
        audit_creation=False,
    )
    expect_not_the_same(report, "0.seen", "replicas differ at degree 2")
