"""What was not cut is not proved: a degree above 1 counts if its ranks shared weights and bytes."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from planted import IN, OUT, batch, block_builder, expect_proved, linear
from shardproof.axis import Axis
from shardproof.cli import prove as prove_command
from shardproof.cli.main import main
from shardproof.comm import differentiable as collectives
from shardproof.errors import UsageError
from shardproof.prover import Case, CaseRun, Report, cases, prove_cases

Build = Callable[[Axis | None], nn.Module]


def prove(build: Build, **options: Any) -> Report:
    given = {"degrees": (1, 2), "audit_creation": False} | options
    return sp.prove(build, F.mse_loss, batch(), **given)


def whole_model() -> nn.Module:
    return block_builder()(None)


def ignore_axis(axis: Axis | None) -> nn.Module:
    return whole_model()


def expect_uncut(report: Report, sentence: str) -> None:
    assert not report.proved
    assert report.identical, "the ranks agree: they all did the same"
    assert report.agrees_with_torch
    assert report.verdict().startswith(f"Not proved: in case model, {sentence}"), report.verdict()
    assert "Cut the model over the axis that build is given" in str(report)


NOT_CUT = "no parameter was cut at degree 2, so that nothing was shown of that degree."


def test_a_build_that_ignores_the_axis_is_not_proved() -> None:
    report = prove(ignore_axis)
    expect_uncut(report, NOT_CUT)
    case = report.as_dict()["cases"][0]
    assert case["cut"] == {
        "1": {"parameters": 0, "sent_bytes": 0},
        "2": {"parameters": 0, "sent_bytes": 0},
    }
    assert case["uncut_degrees"] == [2]
    assert not case["proved"]


def test_nothing_needs_to_be_cut_for_one_rank() -> None:
    expect_proved(prove(ignore_axis, degrees=(1,)))


def test_two_ranks_alone_must_share_something() -> None:
    expect_uncut(prove(ignore_axis, degrees=(2,)), NOT_CUT)


class HandWritten(nn.Module):
    """Tensor-parallel code that looks for a process group, finds none, and runs whole.

    Its `parallel` branch has planted bugs that nobody sees, as it never runs among threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(IN, 48, seed=1), linear(48, OUT, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        if torch.distributed.is_initialized():
            raise AssertionError("the planted bugs")
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


def test_code_that_finds_no_process_group_among_threads_is_not_proved() -> None:
    expect_uncut(prove(lambda axis: HandWritten()), NOT_CUT)


@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_layers_on_an_axis_of_their_own_are_not_cut(numerics: Any) -> None:
    """Every rank makes its model for one rank: it holds all, and nothing is sent."""
    build = block_builder(scheme=sp.Scheme(numerics=numerics))

    def solo(axis: Axis | None) -> nn.Module:
        return build(None if axis is None else Axis.solo())

    expect_uncut(prove(solo), NOT_CUT)


def test_layers_on_an_axis_of_another_size_are_an_error() -> None:
    def build(axis: Axis | None) -> nn.Module:
        model = block_builder()(axis)
        if axis is not None and axis.size == 3:
            two = sp.launch(lambda other: block_builder()(other), degree=2)[0]
            model.up, model.down = two.up, two.down
        return model

    with pytest.raises(
        UsageError, match=r"'up.weight .initial.' is cut over 2 ranks, and .* has 3"
    ):
        prove(build, degrees=(3,))


def test_a_model_that_is_cut_at_one_degree_and_whole_at_another_is_not_proved() -> None:
    """As code does that falls back where a size does not divide."""

    def build(axis: Axis | None) -> nn.Module:
        return block_builder()(Axis.solo() if axis is not None and axis.size == 3 else axis)

    expect_proved(prove(build))
    report = prove(build, degrees=(1, 2, 3))
    expect_uncut(report, NOT_CUT.replace("degree 2", "degree 3"))
    assert report.cases[0].uncut_degrees == (3,)


class SendingByHand(nn.Module):
    """Every rank holds the whole weight and uses a part of it; the parts are summed."""

    def __init__(self, axis: Axis | None) -> None:
        super().__init__()
        self.inner, self.axis = linear(IN, OUT, seed=1), axis

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is None:
            y: Tensor = self.inner(x)
            return y
        mine = self.inner(x) if self.axis.rank == 0 else 0.0 * self.inner(x)
        return collectives.all_reduce(mine, self.axis)


def test_bytes_that_are_sent_while_every_rank_holds_all_weights_prove_nothing() -> None:
    """What is cut is known by layouts alone; without one, every rank has the whole weight."""
    report = prove(SendingByHand)
    assert not report.proved
    sent = report.cases[0].cut["2"].sent_bytes
    assert sent > 0
    assert f"no parameter was cut at degree 2, though {sent} bytes were sent" in report.verdict()


class Decoy(nn.Module):
    """A cut layer that is never called, beside a whole one that is."""

    def __init__(self, axis: Axis | None) -> None:
        super().__init__()
        self.used: nn.Module = linear(IN, OUT, seed=1)
        self.cut: nn.Module = linear(IN, OUT, seed=2)
        if axis is not None:
            self.cut = sp.ColumnParallelLinear.from_linear(self.cut, axis=axis)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


def test_cut_weights_that_nothing_is_sent_for_prove_nothing() -> None:
    expect_uncut(prove(Decoy), "2 parameters were cut at degree 2, but no byte was sent in forward")


def test_a_weight_that_one_rank_owns_whole_is_not_cut() -> None:
    """One unit is one leaf: the other rank is idle, whatever is sent."""

    def build(axis: Axis | None) -> nn.Module:
        layer = linear(IN, 1, seed=1)
        if axis is None:
            return layer
        return sp.ColumnParallelLinear.from_linear(layer, axis=axis, gather_output=True)

    x, target = batch(1)
    report = sp.prove(build, F.mse_loss, (x, target), degrees=(1, 2), audit_creation=False)
    assert not report.proved
    assert "no parameter was cut at degree 2" in report.verdict()


def test_idle_ranks_are_no_fault_where_others_share() -> None:
    """Three units at degree 4: three ranks share them, and one is idle."""

    def build(axis: Axis | None) -> nn.Module:
        layer = linear(IN, 3, seed=1)
        if axis is None:
            return layer
        return sp.ColumnParallelLinear.from_linear(layer, axis=axis, gather_output=True)

    x, target = batch(3)
    expect_proved(sp.prove(build, F.mse_loss, (x, target), degrees=(1, 2, 4), audit_creation=False))


def test_ranks_as_processes_that_share_nothing_are_not_proved() -> None:
    whole = whole_model()
    report = prove(lambda axis: copy.deepcopy(whole), engine="processes")
    expect_uncut(report, NOT_CUT)


@pytest.mark.parametrize("name", ["matmul-row", "matmul-column", "mlp-gathered", "attention"])
def test_every_case_of_ours_is_cut_at_every_degree(name: str) -> None:
    report = prove_cases([cases.find_case(name)], degrees=(1, 3, 8), threads=1)
    assert report.cases[0].uncut_degrees == ()
    assert all(cut.is_cut for at, cut in report.cases[0].cut.items() if at != "1")


def test_the_command_exits_with_1_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    def whole(trial: CaseRun) -> None:
        trial.record("x", torch.ones(3))

    def prove_whole(given: Any, **options: Any) -> Report:
        return prove_cases([Case("ffn", "shares nothing", whole)], **options)

    monkeypatch.setattr(prove_command, "prove_cases", prove_whole)
    with pytest.raises(SystemExit) as left:
        main(["prove", "--case", "ffn", "--degrees", "1,2", "--json", str(tmp_path / "r.json")])
    said = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 1
    assert "FAULT nothing was cut or nothing was sent at degree 2" in said
    assert "Not proved: in case ffn, no parameter was cut at degree 2" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["proved"], report["cases"][0]["uncut_degrees"]) == (False, [2])
