"""Planted faults that no number shows: memory, claims of a case, nothing at all; and the exit code.

The faults of numbers are in `test_planted_layers.py`, `test_planted_sums.py` and
`test_planted_training.py`.
"""

from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from planted import EVEN, IN, FeedForwardBlock, batch, block_builder, expect_proved, prove_column
from shardproof import comm
from shardproof.axis import Axis
from shardproof.cli.main import main
from shardproof.comm.split import Split
from shardproof.prover import cases
from shardproof.prover.case import Case
from shardproof.prover.proof import prove_cases
from shardproof.prover.report import Report


def prove_ffn() -> Report:
    return prove_cases([cases.find_case("ffn")], degrees=(1, 2))


def test_controls_are_proved() -> None:
    expect_proved(prove_ffn())
    expect_proved(prove_column())


def expect_memory(report: Report, shape: str) -> None:
    """The verdict: a whole weight (48, 12) was in the memory of a rank."""
    assert (report.proved, report.identical, report.agrees_with_torch) == (False, True, True)
    assert not report.cases[0].within_memory_bound
    assert report.verdict() == (
        "Not proved: in case column, rank 0 of 2 allocated 2304 bytes for a tensor of shape "
        f"{shape}, more than its bound of 1152."
    )


class WholeWeightAtCreation(sp.ColumnParallelLinear):
    def _take(self, linear: nn.Linear) -> Self:
        copy = linear.weight.detach().clone()
        owned = self.layouts["weight"].owned
        super()._take(linear).weight = nn.Parameter(copy[owned.start : owned.stop])
        return self


def test_whole_weight_in_memory_at_creation() -> None:
    """A shard that is a view keeps all of it alive (transformers 35202, DeepSpeed 3644)."""
    expect_memory(prove_column(WholeWeightAtCreation), "[48, 12]")


class WholeWeightInForward(sp.ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach()
        cut = self.layouts["weight"].cut
        whole = comm.all_gather(weight, self.axis, dim=0, cut=cut, direction="forward")
        return super().forward(x) if whole.isfinite().all() else x


def test_whole_weight_gathered_in_forward() -> None:
    """Equal bits at the price of every rank's memory (TransformerEngine PR 2977)."""
    expect_memory(prove_column(WholeWeightInForward), "[48, 12]")


@sp.declare_elementwise
class WholeState(torch.optim.SGD):
    """Makes room for the state of a whole weight before the first step."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.room = torch.zeros(EVEN, IN)


def test_whole_optimizer_state_at_its_creation() -> None:
    """State is as large as its weight, and as little may a rank hold all of it."""
    report = prove_column(optimizer=lambda given: WholeState(given, lr=0.1, momentum=0.9))
    expect_memory(report, "[48, 12]")


def test_one_collective_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers are right: only the case's own count shows it."""
    correct = Split.start_sum

    def redundant(self: Split, parts: Any, *, direction: str, **named: Any) -> comm.StartedSum:
        started = correct(self, parts, direction=direction, **named)
        if direction == "forward":
            comm.all_reduce(started.wait(), self.axis, direction=direction)
        return started

    monkeypatch.setattr(Split, "start_sum", redundant)
    report = prove_ffn()
    assert (report.proved, report.identical, report.agrees_with_torch) == (False, True, True)
    assert report.verdict() == (
        "Not proved: in case ffn, the check 'one all-reduce forward' failed (at degree 2: "
        "2 all_reduce)."
    )


def test_case_that_records_nothing_is_not_proved() -> None:
    """All of no tensors are the same."""
    report = prove_cases([Case("empty", "records nothing", lambda trial: None)], degrees=(1, 2))
    assert not report.proved
    assert report.verdict() == (
        "Not proved: in case empty, no tensor was recorded, so that nothing was compared."
    )


def test_a_planted_fault_makes_the_command_exit_with_1_and_name_the_tensor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as left:
            main(["prove", "--case", "ffn", "--degrees", "1,2", *options])
        return left.value.code, " ".join(capsys.readouterr().out.split())

    code, said = run()
    assert code == 0
    assert "Proved for 1 case" in said

    correct = Split.start_sum

    def local(self: Split, parts: Any, *, direction: str, **named: Any) -> comm.StartedSum:
        if direction == "backward":
            return correct(self, parts, direction=direction, **named)
        return comm.StartedSum(parts[0])

    monkeypatch.setattr(Split, "start_sum", local)
    code, said = run()
    assert code == 1
    assert "Not proved: in case ffn, tensor output is the first whose bits differ" in said


def test_the_callers_own_model_is_not_trained() -> None:
    """If plain torch trained it, the ranks would be cut from other numbers than it began with."""
    whole = block_builder()(None)
    before = [parameter.detach().clone() for parameter in whole.parameters()]

    def build(axis: Axis | None) -> nn.Module:
        if axis is None:
            return whole
        front = nn.Linear(12, 12, device="meta").to_empty(device="cpu")
        front.load_state_dict(whole.front.state_dict())
        up = sp.ColumnParallelLinear.from_linear(whole.up, axis=axis, name="up")
        down = sp.RowParallelLinear.from_linear(whole.down, axis=axis, name="down")
        return FeedForwardBlock(front, up, down, torch.relu)

    report = sp.prove(
        build,
        F.mse_loss,
        batch(),
        degrees=(1, 2),
        optimizer=lambda given: torch.optim.SGD(given, lr=0.1),
    )
    expect_proved(report)
    after = list(whole.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
