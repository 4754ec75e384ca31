"""NaN and Inf show nothing: a model that has them is proved only where that was asked for."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from hf_zoo import SIZES
from planted import FeedForwardBlock, batch, block_builder, expect_proved, prove_block, sgd
from shardproof.axis import Axis
from shardproof.cli.main import main
from shardproof.prover import Report
from shardproof.prover.cases.transformers_models import SIZES as CASE_SIZES

Build = Callable[[Axis | None], nn.Module]
WAY_OUT = "mend them, or allow them with allow_nonfinite=True (--allow-nonfinite)"


def prove(build: Build, loss: Any = F.mse_loss, **options: Any) -> Report:
    given = {"degrees": (1, 2), "audit_creation": False, "optimizer": sgd} | options
    return sp.prove(build, loss, given.pop("batch", batch()), **given)


def spoiled(spoil: Callable[[nn.Module], object], **parts: Any) -> Build:
    """A FeedForwardBlock of which plain torch's and every rank's is spoiled alike."""
    build = block_builder(**parts)

    def made(axis: Axis | None) -> nn.Module:
        model = build(axis)
        spoil(model)
        return model

    return made


def expect_nonfinite(report: Report, tensor: str, where: str) -> None:
    said = report.verdict()
    assert not report.proved
    assert f"tensor {tensor} is the first whose numbers are not all finite ({where}" in said, said
    assert WAY_OUT in said
    kept = next(each for each in report.cases[0].tensors if each.name == tensor)
    assert kept.nonfinite


@torch.no_grad()
def nan_in_a_weight(model: nn.Module) -> None:
    model.front.weight[2, 3] = math.nan


@torch.no_grad()
def inf_in_a_bias(model: nn.Module) -> None:
    model.down.bias[1] = -math.inf


@pytest.mark.parametrize(
    ("spoil", "tensor", "where"),
    [
        (nan_in_a_weight, "front.weight", "1 of 144 are NaN or infinite, in plain PyTorch too"),
        (inf_in_a_bias, "down.bias", "1 of 7 are NaN or infinite, in plain PyTorch too"),
    ],
)
def test_a_weight_that_is_not_finite(
    spoil: Callable[[nn.Module], None], tensor: str, where: str
) -> None:
    report = prove(spoiled(spoil))
    expect_nonfinite(report, f"{tensor} (initial)", where)
    assert report.identical
    assert report.cases[0].first_difference() == {
        "tensor": f"{tensor} (initial)", "what": "not finite", "degrees": [1, 2], "detail": ""
    }  # fmt: skip
    allowed = prove(spoiled(spoil), allow_nonfinite=True)
    assert allowed.proved, allowed.verdict()
    assert "NaN or Inf were allowed, and occur in" in allowed.verdict()
    assert allowed.as_dict()["cases"][0]["allows_nonfinite"]


def test_a_nan_of_a_cut_weight_is_counted_once() -> None:
    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            layouts = getattr(model.up, "layouts", None)
            owned = layouts["weight"].owned if layouts else range(48)
            model.up.weight[[unit - owned.start for unit in (5, 40) if unit in owned]] = math.nan

    report = prove(spoiled(spoil))
    expect_nonfinite(report, "up.weight (initial)", "24 of 576 are NaN or infinite, in plain Py")
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    tensor = next(
        each for each in document["cases"][0]["tensors"] if each["name"] == "up.weight (initial)"
    )
    assert tensor["nonfinite"] == {"1": 24, "2": 24, "torch": 24, "fp64": 24}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite(value: float) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target).detach() * value + 0.0 * output.sum()

    expect_nonfinite(prove_block(loss=loss), "loss", "1 of 1 are NaN or infinite, in plain PyTorch")


def test_a_mean_of_nothing() -> None:
    """The loss of an empty batch; its gradients are sums of nothing, zero and finite."""
    empty = tuple(each[:0] for each in batch())
    expect_nonfinite(prove(block_builder(), batch=empty), "loss", "1 of 1 are NaN or infinite")


def test_gradients_alone() -> None:
    def spoil(model: nn.Module) -> None:
        model.down.bias.register_hook(lambda grad: grad * math.inf)

    expect_nonfinite(prove(spoiled(spoil)), "down.bias.grad", "7 of 7 are NaN or infinite")


@sp.declare_elementwise
class NanState(torch.optim.SGD):
    """Momentum of which one number is lost after the step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for parameter, state in self.state.items():
            if parameter.shape == (12,):
                state["momentum_buffer"][0] = math.nan


def test_optimizer_state_alone() -> None:
    report = prove_block(optimizer=lambda given: NanState(given, lr=0.1, momentum=0.9))
    expect_nonfinite(report, "front.bias.momentum_buffer", "1 of 12 are NaN or infinite")


def test_a_later_step_that_diverges() -> None:
    """Its tensors are not compared with plain torch, and are not to be proved either."""
    options = {"optimizer": lambda given: torch.optim.SGD(given, lr=1e30), "steps": 3}
    report = prove_block(**options)
    assert not report.proved
    assert "tensor step 2: output is the first whose numbers are not all finite" in str(report)


def test_one_degree_alone() -> None:
    def spoil(block: FeedForwardBlock, axis: Axis) -> None:
        if axis.size == 2:
            block.down.register_forward_hook(lambda module, given, y: y / 0.0)

    report = prove_block(change=spoil)
    where = "35 of 35 are NaN or infinite at degree 2, in plain PyTorch all are finite"
    expect_nonfinite(report, "output", where)
    assert "tensor output is the first whose bits differ" in report.verdict()
    assert not prove(block_builder(change=spoil), allow_nonfinite=True).proved


def test_a_fault_of_finite_numbers_that_comes_before_is_named_before() -> None:
    def spoil(block: FeedForwardBlock, axis: Axis) -> None:
        with torch.no_grad():
            block.up.weight.mul_(axis.size)
        block.register_forward_hook(lambda module, given, y: y / 0.0)

    said = prove_block(change=spoil).verdict()
    assert said.startswith("Not proved: in case block, tensor up.weight (initial) is the first who")
    assert "tensor output is the first whose numbers are not all finite" in said


class Overflowing(nn.Module):
    """Finite in fp32; in fp64 it counts to more than fp64 can hold."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * (math.inf if x.dtype == torch.float64 else 1.0)


def test_an_fp64_run_that_overflows_judges_nothing() -> None:
    build = block_builder()
    report = prove(lambda axis: Overflowing(build(axis)))
    expect_nonfinite(report, "output", "35 of 35 are NaN or infinite in the fp64 run")


class Masked(nn.Module):
    """Adds a mask to the scores of a softmax, as attention does."""

    def __init__(self, inner: nn.Module, mask: Tensor, *, grows: bool = False) -> None:
        super().__init__()
        self.inner, self.grows = inner, grows
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.inner(x) + self.mask).softmax(-1)
        if self.grows:
            self.mask[0] = -math.inf
        return y


def masking(mask: Tensor, **options: Any) -> Build:
    build = block_builder()
    return lambda axis: Masked(build(axis), mask.clone(), **options)


def test_a_mask_of_infinities_is_no_fault() -> None:
    mask = torch.zeros(7)
    mask[5:] = -math.inf
    expect_proved(prove(masking(mask)))
    expect_proved(prove(masking(mask), steps=2))


def test_a_mask_of_nan_is_a_fault() -> None:
    mask = torch.zeros(7)
    mask[3] = math.nan
    expect_nonfinite(prove(masking(mask)), "output", "35 of 35 are NaN or infinite")
    unused = block_builder()

    def build(axis: Axis | None) -> nn.Module:
        model = unused(axis)
        model.register_buffer("idle", mask.clone())
        return model

    expect_nonfinite(prove(build), "idle (after forward)", "1 of 7 are NaN or infinite")


def test_a_buffer_that_becomes_infinite_is_a_fault() -> None:
    """A running mean that overflowed is no mask."""
    report = prove(masking(torch.zeros(7), grows=True))
    expect_nonfinite(report, "mask (after forward)", "1 of 7 are NaN or infinite")


# `shardproof prove --model`


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with one NaN, in the row of a token that no text has."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    path = tmp_path_factory.mktemp("model")
    sizes = SIZES | {"vocab_size": CASE_SIZES["vocab_size"], "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with torch.no_grad():
        model.model.embed_tokens.weight[256, 1] = math.nan
    model.save_pretrained(path)
    return path


def command(directory: Path, *options: str) -> Result:
    arguments = ["prove", "--model", str(directory), "--degrees", "1,2", "--steps", "2"]
    return CliRunner().invoke(main, [*arguments, *options])


def test_the_command_does_not_prove_a_model_with_nan(directory: Path) -> None:
    refused = command(directory)
    said = " ".join(refused.stdout.split())
    assert refused.exit_code == 1, said
    assert (
        "Not proved: in case model, tensor model.embed_tokens.weight (initial) is the first" in said
    )
    assert "1 of 8224 are NaN or infinite, in plain PyTorch too" in said
    assert WAY_OUT in said
    allowed = command(directory, "--allow-nonfinite")
    said = " ".join(allowed.stdout.split())
    assert allowed.exit_code == 0, said
    assert "NaN or Inf were allowed, and occur in" in said
