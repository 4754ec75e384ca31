"""Weights that rounding decides: right models are proved, and no fault hides behind rounding.

The bias of a key projection has no gradient: softmax does not see it. What autograd finds for it
is rounding, and Adam makes a whole step of that.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from planted import batch, block_builder, expect_proved, expect_torch
from shardproof.axis import Axis
from shardproof.prover import Report
from shardproof.prover.cases.gpt import SelfAttention, attention_style
from shardproof.prover.compare import (
    NEARLY,
    ROUNDINGS,
    Figures,
    Rounding,
    StepReference,
    measure_step,
    rounding,
    spread,
)

HEADS, HEAD_DIM, INNER = 4, 8, 91
HIDDEN = HEADS * HEAD_DIM
KEY_BIAS = "attention.key.bias"
PLAN = {
    "attention": attention_style(HEADS, HEAD_DIM),
    "up": sp.ColumnParallel(),
    "down": sp.RowParallel(),
}

Change = Callable[[nn.Module, Axis], None]
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Layer(nn.Module):
    """A layer of a transformer with a bias in every projection, as GPT-2 has it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(HIDDEN)
            self.attention = SelfAttention(HEADS, HEAD_DIM, is_causal=True, bias=True)
            for name in ("query", "key", "value"):
                setattr(self.attention, name, nn.Linear(HIDDEN, HIDDEN))
            self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


def words(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 7, HIDDEN)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def prove(
    optimizer: Make = adamw,
    *,
    whole: nn.Module | None = None,
    change: Change | None = None,
    degrees: tuple[int, ...] = (1, 2),
    **options: Any,
) -> Report:
    """Prove a step of a Layer; `change` is called on what every rank has."""
    plain = Layer() if whole is None else whole

    def build(axis: Axis | None) -> nn.Module:
        model = copy.deepcopy(plain)
        if axis is None:
            return model
        model = sp.parallelize(model, PLAN, axis)
        if change is not None:
            change(model, axis)
        return model

    return sp.prove(
        build,
        F.mse_loss,
        words(),
        degrees=degrees,
        optimizer=optimizer,
        audit_creation=False,
        **options,
    )


def decided(report: Report) -> set[str]:
    """The tensors of which rounding decides some numbers."""
    tensors = report.as_dict()["cases"][0]["tensors"]
    return {tensor["name"] for tensor in tensors if tensor["decided_by_rounding"]}


# Right models


@pytest.mark.parametrize(
    ("optimizer", "is_decided"),
    [
        (adamw, True),
        (lambda given: torch.optim.Adam(given, lr=0.1), True),
        (torch.optim.Adagrad, True),
        (torch.optim.RMSprop, True),
        (lambda given: torch.optim.Rprop(given, lr=0.01), True),
        (lambda given: torch.optim.SGD(given, lr=0.1), False),
        (lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, nesterov=True), False),
        (torch.optim.Adadelta, False),
    ],
    ids=[
        "adamw", "adam", "adagrad", "rmsprop", "rprop", "sgd", "momentum",
        "adadelta",
    ],
)  # fmt: skip
def test_a_layer_with_a_bias_of_keys_is_proved(optimizer: Make, is_decided: bool) -> None:
    report = prove(optimizer, degrees=(1,))
    expect_proved(report)
    assert (KEY_BIAS in decided(report)) == is_decided
    assert bool(decided(report)) == is_decided, decided(report)
    assert (
        " rounding decides some numbers, in plain PyTorch as here." in str(report)
    ) == is_decided
    assert (f"  {KEY_BIAS}: decided by rounding (largest diff" in str(report)) == is_decided


def test_uneven_degrees_are_proved_too() -> None:
    report = prove(degrees=(1, 3, 4))
    expect_proved(report)
    assert KEY_BIAS in decided(report)


@torch.no_grad()
def begin_at_zero(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return model


def test_biases_that_begin_at_zero_are_proved() -> None:
    """As most models begin: the update is all that there is of the weight."""
    expect_proved(prove(whole=begin_at_zero(Layer(seed=3))))


@torch.no_grad()
def kill_units(model: nn.Module) -> nn.Module:
    model.up.bias[::3] = -100.0
    return model


def test_units_that_nothing_reaches_are_proved() -> None:
    expect_proved(prove(whole=kill_units(Layer())))


class Reordered(nn.Module):
    """A linear that is plain torch's, but adds its products in another order."""

    def __init__(self, linear: nn.Linear, order: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.order = linear.weight, linear.bias, order

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x[..., self.order], self.weight[:, self.order]) + self.bias
        return y


def reorder(model: Layer, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    for parent, name in (
        (model.attention, "query"), (model.attention, "key"), (model.attention, "value"),
        (model.attention, "output"), (model, "up"), (model, "down"),
    ):  # fmt: skip
        linear = getattr(parent, name)
        order = torch.randperm(linear.in_features, generator=generator)
        setattr(parent, name, Reordered(linear, order))
    return model


@pytest.mark.parametrize(
    ("optimizer", "seed"), [(adamw, 0), (torch.optim.Adagrad, 1)], ids=["adamw", "adagrad"]
)
def test_plain_torch_in_another_order_of_summation_passes(seed: int, optimizer: Make) -> None:
    """No layer of ours: the same model, judged as ours is, at one rank."""
    plain = Layer(seed)
    report = sp.prove(
        lambda axis: copy.deepcopy(plain) if axis is None else reorder(copy.deepcopy(plain), seed),
        F.mse_loss,
        words(seed),
        degrees=(1,),
        optimizer=optimizer,
        threads=1 + seed,
    )
    expect_proved(report)
    assert KEY_BIAS in decided(report)


def gradients(model: nn.Module, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(dtype)
    x, target = (each.to(dtype) for each in words(seed))
    F.mse_loss(model(x), target).backward()
    return {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_rounding_of_plain_torch_in_another_order_is_within_half_of_what_is_allowed() -> None:
    """The largest element of each gradient's rounding, over 8 models of 14 tensors."""
    worst = 0.0
    for seed in range(8):
        model = Layer(seed)
        true, plain = (gradients(model, dtype, seed) for dtype in (torch.float64, torch.float32))
        other = gradients(reorder(copy.deepcopy(model), seed), torch.float32, seed)
        for name, exact in true.items():
            noise = (plain[name] - exact).abs().max().item()
            worst = max(worst, (other[name] - plain[name]).abs().max().item() / noise)
    assert 1.0 < worst <= ROUNDINGS / 2


# Faults


def off_by(constant: float, name: str = KEY_BIAS) -> Change:
    def change(model: nn.Module, axis: Axis) -> None:
        model.get_parameter(name).register_hook(lambda grad: grad + constant)

    return change


def test_a_gradient_that_should_be_zero_is_a_constant() -> None:
    """A tenth of the absolute tolerance, and a hundred times rounding."""
    report = prove(change=off_by(1e-7))
    expect_torch(report, f"{KEY_BIAS}.grad", "times plain PyTorch's, which is rounding")
    assert KEY_BIAS not in decided(report)


def test_a_gradient_that_should_be_zero_is_a_small_constant() -> None:
    """Hardly larger than rounding: Adam makes it large, and rounding does not reach so far."""
    report = prove(change=off_by(2e-8))
    assert report.identical
    assert not report.agrees_with_torch
    # Where plain torch's own rounding is small, as it may be on another processor, the gradient
    # itself gives it away.
    assert report.cases[0].first_difference()["tensor"] in {KEY_BIAS, f"{KEY_BIAS}.grad"}
    assert KEY_BIAS not in decided(report)


def counted_twice(name: str) -> Change:
    def change(model: nn.Module, axis: Axis) -> None:
        model.get_parameter(name).register_hook(lambda grad: 2 * grad)

    return change


@pytest.mark.parametrize("name", ["attention.value.bias", "attention.key.weight", "up.weight"])
def test_a_gradient_counted_twice(name: str) -> None:
    """Adam's step does not depend on it; in two of the three, rounding decides some numbers."""
    expect_torch(prove(change=counted_twice(name), degrees=(1,)), f"{name}.grad")


@sp.declare_elementwise
class Meddling(torch.optim.AdamW):
    """AdamW that, after its step, puts some weights elsewhere: those that have `meddle`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        given = [each for group in self.param_groups for each in group["params"]]
        before = {each: each.detach().clone() for each in given if hasattr(each, "meddle")}
        super().step(closure)
        for parameter, old in before.items():
            parameter.copy_(parameter.meddle(old, parameter))


def meddling(lr: float = 1e-3) -> Make:
    return lambda given: Meddling(given, lr=lr)


def meddle(name: str, make: Callable[[Tensor, Tensor], Tensor]) -> Change:
    def change(model: nn.Module, axis: Axis) -> None:
        model.get_parameter(name).meddle = make

    return change


def test_a_step_that_nobody_meddles_with_is_proved() -> None:
    change = meddle("up.weight", lambda old, new: new)
    report = prove(meddling(), change=change, degrees=(1,))
    expect_proved(report)
    assert KEY_BIAS in decided(report)


def test_a_bias_of_keys_that_is_never_updated() -> None:
    """It stays nearer to the fp64 run than plain torch's own: its gradient gives it away."""
    report = prove(meddling(), change=meddle(KEY_BIAS, lambda old, new: old))
    expect_torch(report, KEY_BIAS, "it has a gradient and was not updated, plain PyTorch's was")


def test_a_bias_of_keys_that_moves_ten_times_too_far() -> None:
    report = prove(meddling(), change=meddle(KEY_BIAS, lambda old, new: old + 10 * (new - old)))
    expect_torch(report, KEY_BIAS, "and rounding explains all but")


@pytest.mark.parametrize("name", ["attention.key.weight", "up.weight"])
def test_a_row_that_is_not_updated_of_a_weight_that_rounding_decides(name: str) -> None:
    """Rounding decides single elements; the others are held to the tolerance."""

    def first_row_stays(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old[:1], new[1:]])

    report = prove(meddling(), change=meddle(name, first_row_stays), degrees=(1,))
    expect_torch(report, name, "and rounding explains all but")


def test_one_element_in_a_thousand_that_is_larger_than_rounding() -> None:
    """A tenth of the absolute tolerance, in the element whose gradient is nearest to zero."""
    plain = Layer()
    name = "attention.key.weight"
    place = gradients(plain, torch.float64, 1)[name].abs().argmin().item()

    def change(model: nn.Module, axis: Axis) -> None:
        def spoil(grad: Tensor) -> Tensor:
            spoilt = grad.clone()
            spoilt.view(-1)[place] = 1e-7
            return spoilt

        model.get_parameter(name).register_hook(spoil)

    report = prove(change=change, degrees=(1,), whole=plain)
    expect_torch(report, name, "and rounding explains all but")


@pytest.mark.parametrize(
    ("share", "detail"),
    [(0.0, "it has a gradient and was not"), (0.5, "its update is wrong by 0.4")],
)
def test_an_update_within_the_tolerance_that_is_missing(share: float, detail: str) -> None:
    """A learning rate of 1e-6 moves a weight by less than atol: the weight alone shows nothing."""
    change = meddle("up.weight", lambda old, new: old + share * (new - old))
    expect_proved(prove(meddling(1e-6), degrees=(1,)))
    report = prove(meddling(1e-6), change=change, degrees=(1,))
    expect_torch(report, "up.weight", detail)


def test_a_unit_that_nothing_reaches_and_that_moves() -> None:
    """Its gradient is zero in plain torch, exactly: there is no rounding to explain another."""
    whole = kill_units(Layer())
    expect_proved(prove(whole=whole, degrees=(1,)))
    report = prove(whole=whole, degrees=(1,), change=off_by(1e-9, "up.weight"))
    expect_torch(report, "up.weight")


class Cancelling(nn.Module):
    """Adds a large number to what it gets, and takes it off again."""

    def __init__(self, inner: nn.Module, error: float) -> None:
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * 1.0009765625 + 1e4 + self.error - 1e4
        return y


def prove_cancelling(error: float) -> Report:
    build = block_builder()
    return sp.prove(
        lambda axis: Cancelling(build(axis), error if axis else 0.0),
        F.mse_loss,
        batch(),
        degrees=(1, 2),
        audit_creation=False,
    )


def test_an_output_in_which_plain_torch_cancels_is_judged_by_its_own_rounding() -> None:
    """The rounding of 1e4 is 1e-3: the tolerance of numbers near 1 asks for more than there is."""
    expect_proved(prove_cancelling(0.0))
    report = prove_cancelling(1e-3)  # one unit in the last place, as another order may give
    output = next(each for each in report.cases[0].tensors if each.name == "output")
    assert output.is_decided_by_rounding
    assert not output.torch.allclose
    expect_torch(prove_cancelling(1e-2), "output")


# The measures


def test_the_spread_of_a_gradient_is_its_measured_rounding() -> None:
    precise = torch.linspace(-1, 1, 16, dtype=torch.float64)
    precise[3] = 0.0
    plain = precise.float()
    plain[5] += 1e-6
    noise = (plain.double() - precise).abs().max().item()
    found = spread(plain, precise, largest=1.0)
    assert found.dtype == torch.float64
    assert found[3] == 0.0, "exactly zero in both: nothing reached it"
    assert found[4] == found[5] == ROUNDINGS * noise
    assert torch.equal(spread(plain[:0], precise[:0], largest=1.0), precise[:0])


def test_a_sum_that_is_exactly_zero_by_chance_has_a_spread() -> None:
    """Its neighbours are nothing but rounding in fp64 too; part of a fused weight may be real."""
    precise = torch.tensor([1e-18, -2e-18, 0.0, 1e-18] + [0.5] * 6, dtype=torch.float64)
    plain = precise.float() + torch.tensor([1e-9, -1e-9, 0.0, 5e-10] + [0.0] * 6)
    assert spread(plain, precise, 0.5).tolist() == pytest.approx([ROUNDINGS * 1e-9] * 10)


def test_a_few_elements_do_not_show_their_rounding() -> None:
    """A single number may be right by luck: the largest gradient of the model says more."""
    precise = torch.tensor([1e-18], dtype=torch.float64)
    found = spread(torch.zeros(1), precise, largest=0.5)
    assert found.item() == pytest.approx(ROUNDINGS * 0.5 * torch.finfo(torch.float32).eps)


def before(**changes: Any) -> StepReference:
    made = StepReference(
        torch.zeros(2), torch.zeros(2).double(), torch.tensor([-1.0, 2.0]),
        torch.tensor([1.0, 2.0]), True,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_the_distance_from_what_rounding_explains() -> None:
    plain, true = torch.tensor([0.5, 2.0]), torch.tensor([0.0, 2.0]).double()
    inside = measure_step(torch.tensor([-1.0, 2.0]), plain, true, before())
    assert inside.outside == 0.0
    assert (inside.moved_ours, inside.moved_torch) == (2.0, 2.0)
    assert inside.squared_ours == inside.squared_torch == 0.0
    assert inside.squared_update == 4.0
    outside = measure_step(torch.tensor([-1.5, 2.25]), plain, true, before())
    assert outside.outside == 0.5
    assert outside.squared_ours > 0.0
    empty = measure_step(*[torch.zeros(0)] * 2, torch.zeros(0).double(), StepReference(
        *[torch.zeros(0)] * 4, False
    ))  # fmt: skip
    assert (empty.outside, empty.has_gradient) == (0.0, False)


def test_one_rank_without_a_gradient_does_not_speak_for_all() -> None:
    plain, true = torch.tensor([0.5, 2.0]), torch.tensor([0.0, 2.0]).double()
    stuck = measure_step(torch.zeros(2), plain, true, before())
    none = measure_step(torch.zeros(2), plain, true, before(has_gradient=False))
    figures = [Figures(max_abs_reference=2.0)]
    assert rounding(figures, [stuck], torch.float32, 2).is_stuck
    assert not rounding(figures, [none], torch.float32, 2).is_stuck


def test_a_tensor_of_another_kind_must_be_nearly_as_near_as_plain_torch() -> None:
    found = Rounding(tolerance=1e-6, ours=4e-3, torch=1e-3, times=1.0)
    assert found.explains
    assert not dataclasses.replace(found, ours=4.1e-3).explains
    assert not dataclasses.replace(found, times=NEARLY + 0.1).explains
    assert not dataclasses.replace(found, ours=3e-7, torch=9e-7).explains, "torch is within it"
    assert not dataclasses.replace(found, ours=None).explains
