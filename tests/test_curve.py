"""What training adds to a report: losses, their picture, and how near ours are to fp64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planted import expect_proved, prove_block, sgd
from shardproof.prover import curve
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.case_report import Errors, TensorReport
from shardproof.prover.judge import accuracy_checks
from shardproof.prover.proof import prove_cases
from shardproof.prover.training import KeepDouble

# Losses in a report


def test_a_report_has_the_loss_of_every_step() -> None:
    report = prove_block(steps=3, optimizer=sgd, degrees=(1, 2))
    expect_proved(report)
    case = report.as_dict()["cases"][0]
    assert len(case["losses"]) == 3
    assert case["losses"][0] > case["losses"][2]
    assert case["curves"] == {"": {"1": case["losses"], "2": case["losses"]}}


def test_a_case_may_train_twice() -> None:
    def work(trial: CaseRun) -> None:
        trial.record("x", torch.ones(2))
        for step in range(2):
            trial.follow(torch.tensor(3.0 - step))
            trial.follow(torch.tensor(4.0 - step), run="again")

    case = prove_cases([Case("both", "", work)], degrees=(1, 2)).as_dict()["cases"][0]
    assert case["losses"] == [3.0, 2.0]
    assert case["curves"]["again"] == {"1": [4.0, 3.0], "2": [4.0, 3.0]}


def test_a_case_without_training_has_no_losses() -> None:
    def work(trial: CaseRun) -> None:
        trial.record("x", torch.ones(2))

    report = prove_cases([Case("still", "", work)], degrees=(1, 2)).as_dict()
    assert report["cases"][0]["losses"] == []
    assert report["cases"][0]["curves"] == {}


# Their picture


def drawn(**curves: Any) -> dict[str, Any]:
    return {
        "cases": [{"name": "gpt", "curves": {"": curves, "dropout": curves}}],
        "numerics": "invariant",
        "engine": "threads",
        "seed": 5,
    }


def test_the_caption_says_that_the_curves_coincide() -> None:
    same = drawn(**{"1": [5.0, 4.0], "2": [5.0, 4.0]})
    assert curve.caption(same) == (
        "the curves of all degrees have the same bits and coincide (invariant, threads, seed 5)"
    )


def test_the_caption_says_where_they_do_not() -> None:
    other = drawn(**{"1": [5.0, 4.0], "2": [5.0, 4.0000001]})
    assert curve.caption(other) == "the degrees have different losses in gpt, gpt, dropout"
    assert curve.caption(drawn(**{"2": [5.0]})).startswith("one degree (")


def test_one_line_for_every_degree(tmp_path: Path) -> None:
    if not curve.is_installed():
        pytest.skip("matplotlib is not installed: pip install 'shardproof[plot]'")
    report = drawn(**{str(degree): [5.0, 4.5, 4.0] for degree in (1, 2, 3, 4, 8)})
    for name in ("losses.png", "losses.svg"):
        curve.draw(report, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    text = (tmp_path / "losses.svg").read_text()
    assert all(f"<!-- degree {degree} -->" in text for degree in (1, 2, 3, 4, 8))
    assert "coincide" in text


# As near to fp64 as plain torch


def tensor(name: str, ours: float | None, plain: float | None, dtype: str = "float32") -> Any:
    return TensorReport(name, (2,), dtype, {}, True, True, None, Errors(ours, plain))


def checked(*tensors: TensorReport, accuracy: float = 1.5) -> tuple[bool, str]:
    case = Case("c", "", lambda trial: None, accuracy=accuracy)
    (check,) = accuracy_checks(case, tensors)
    assert check.name == f"no further from fp64 than {accuracy:g} times plain torch's fp32"
    return check.passed, check.detail


def test_ours_may_be_so_many_times_further() -> None:
    good, worse = tensor("logits", 1e-6, 2e-6), tensor("a.weight.grad", 2.8e-6, 2e-6)
    assert checked(good, worse) == (True, "2 tensors, median 0.95, worst 1.40 (a.weight.grad)")
    assert checked(good, worse, accuracy=1.2)[0] is False


def test_what_comes_after_the_update_and_fp64_itself_are_not_counted() -> None:
    loss = tensor("loss", 1e-7, 1e-7)
    others = [tensor("a.weight", 9e-5, 1e-6), tensor("fp64: loss", 9e-15, 1e-16, "float64")]
    assert checked(loss, *others)[1].startswith("1 tensors")


def test_a_single_number_may_be_exact_by_luck() -> None:
    assert checked(tensor("loss", 1.1e-7, 0.0))[0]
    assert not checked(tensor("loss", 3e-7, 0.0))[0]


def test_no_number_is_never_near() -> None:
    assert not checked(tensor("loss", None, 1e-7))[0]
    assert checked() == (False, "no tensor was compared")


def test_a_case_that_claims_nothing_has_no_such_check() -> None:
    assert not list(accuracy_checks(Case("c", "", lambda trial: None), [tensor("loss", 1, 0)]))


# fp64 that stays fp64


class Narrow(nn.Module):
    """Computes in fp32 whatever it is given, in every way that models have."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * 3
        y = y.to(torch.float32) / 7
        y = y.to(dtype=torch.float32, copy=True)
        return F.softmax(y, dim=-1, dtype=torch.float32).to(x.dtype)


def test_casts_to_fp32_are_left_out() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    true = F.softmax(x * 3 / 7, dim=-1)
    assert not torch.equal(Narrow()(x), true)
    with KeepDouble():
        y = Narrow()(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, true)
    assert not torch.equal(Narrow()(x), true), "it ends with the block"


def test_nothing_else_is_touched() -> None:
    with KeepDouble():
        assert torch.arange(3).float().dtype == torch.float32
        assert torch.ones(2).to(torch.float32).dtype == torch.float32
        assert torch.ones(2, dtype=torch.float64).half().dtype == torch.float16
