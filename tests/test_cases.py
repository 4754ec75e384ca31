import dataclasses
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shardproof import c_modules
from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.prover import compare_with, prove_cases
from shardproof.prover.case import CaseRun
from shardproof.prover.cases import all_cases, digits, find_case, mlp, notebooks
from shardproof.prover.cases.drawn_layers import (
    column_linear,
    fill_like_linear,
    fill_normal,
    generator,
    row_linear,
)
from shardproof.prover.cases.single_linear import LINEAR_COLUMN, LINEAR_ROW
from shardproof.ranks import launch
from shardproof.scheme import Scheme

NOTEBOOKS = ["matmul-row", "matmul-column", "ffn", "linear-column", "linear-row", "mlp-gathered"]
DEGREES = (1, 2, 3, 8)


def case_run(axis=None, seed=12345):
    return CaseRun(axis=axis, scheme=Scheme(), seed=seed, recorder=None)


# All of them


@pytest.fixture(scope="module")
def proof():
    return prove_cases([find_case(name) for name in NOTEBOOKS], degrees=DEGREES, threads=1)


@pytest.fixture(scope="module")
def case(proof):
    cases = {case.name: case for case in proof.cases}
    return cases.__getitem__


def test_every_case_is_there():
    others = ["attention", "digits", "gpt", "llama", "qwen"]
    assert [case.name for case in all_cases()] == [*NOTEBOOKS, *others]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_case_is_proved_on_threads(name, proof, case):
    assert case(name).proved, proof.verdict()
    assert case(name).degrees == DEGREES


def test_ours_is_as_accurate_as_torch(proof):
    errors = [tensor.fp64 for case in proof.cases for tensor in case.tensors if tensor.fp64]
    assert not any(each.ours is None or each.torch is None for each in errors)
    inexact = [each for each in errors if each.ours or each.torch]
    ratios = [each.ours / each.torch if each.torch else math.inf for each in inexact]
    assert len(ratios) > 20
    assert statistics.median(ratios) <= 1.05


@pytest.mark.parametrize("seed", [0])
def test_notebook_cases_are_proved_with_other_random_seeds(seed):
    cases = [find_case(name) for name in NOTEBOOKS]
    report = prove_cases(cases, degrees=(1, 3), threads=1, seed=seed)
    assert report.proved, report.verdict()
    # The printed outputs are claimed with the notebook's own random seed only.
    assert "outputs are the printed ones" not in [c.name for c in report.cases[-1].checks]


# One by one


def test_matmul_records_the_tensors_of_the_notebook(case):
    for name in ("matmul-row", "matmul-column"):
        tensors = {tensor.name: tensor.shape for tensor in case(name).tensors}
        assert tensors == {"w (initial)": (4, 8), "y": (2, 8), "loss": (), "w.grad": (4, 8)}


def test_both_matmuls_are_one_system(case):
    # The same w; how y and the gradient are summed is the plan's, and may differ.
    row, column = (case(name).tensors[0] for name in ("matmul-row", "matmul-column"))
    assert row.sha256["1"] == column.sha256["1"]


def test_ffn_has_one_all_reduce_each_way_and_nothing_else(case):
    comm = case("ffn").comm
    for degree in ("2", "3", "8"):
        for direction in ("forward", "backward"):
            assert list(comm[degree][direction]) == ["all_reduce"]
            assert comm[degree][direction]["all_reduce"]["calls"] == 1
    assert len(case("ffn").checks) == 2


def test_linear_meets_the_notebooks_elementwise_tolerance(case):
    for name in ("linear-column", "linear-row"):
        strict = {tensor.name for tensor in case(name).tensors if tensor.seed_allclose}
        assert strict == {"weight", "bias", "weight.grad", "bias.grad", "input.grad"}


def test_no_rank_of_linear_holds_more_than_its_share(case):
    full = 608 * 1024 * 4
    for name in ("linear-column", "linear-row"):
        for degree in (2, 3, 8):
            for rank in case(name).memory[str(degree)]:
                assert rank.largest_bytes <= math.ceil(8 / degree) / 8 * full


def test_linear_communicates_as_the_notebook_says(case):
    column, row = (case(name).comm["2"] for name in ("linear-column", "linear-row"))
    assert {kind: n["calls"] for kind, n in column["forward"].items()} == {"all_gather": 1}
    assert {kind: n["calls"] for kind, n in column["backward"].items()} == {"all_reduce": 1}
    assert {kind: n["calls"] for kind, n in row["forward"].items()} == {"all_reduce": 1}
    assert {kind: n["calls"] for kind, n in row["backward"].items()} == {"all_gather": 1}


def test_mlp_outputs_are_those_that_the_notebook_prints(case):
    names = [check.name for check in case("mlp-gathered").checks]
    assert names == [
        "outputs are the printed ones",
        "an all-gather after each layer",
        "dh is reduce-scattered",
    ]


def test_an_output_that_is_not_the_printed_one_fails_the_check():
    wrong = torch.tensor(notebooks.MLP_OUTPUTS)
    wrong[3, 1] += 2e-4
    on_rank = case_run(axis=Axis.solo())
    mlp.examine(on_rank, wrong)
    assert not on_rank.checks[0].passed
    assert "2.0e-04" in on_rank.checks[0].detail


# Draws


def test_a_generator_of_its_own_gives_the_global_generators_numbers():
    data = mlp.RandomTensorDataset(32, 6, 2, seed=12345).data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        expected = [(torch.randn(6), torch.randn(2)) for _ in range(32)]
    for (x, y), (other_x, other_y) in zip(data, expected, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize(("in_features", "out_features"), [(6, 4), (4, 2), (37, 19), (64, 250)])
def test_the_row_by_row_draw_is_nn_linears_own(in_features, out_features):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = nn.Linear(in_features, out_features), nn.Linear(in_features, out_features)
    own = torch.Generator().manual_seed(5)
    for reference in expected:
        layer = column_linear(case_run(), in_features, out_features, name="x")
        fill_like_linear(layer, own)
        assert torch.equal(layer.weight, reference.weight)
        assert torch.equal(layer.bias, reference.bias)


@pytest.mark.parametrize("make", [column_linear, row_linear])
@pytest.mark.parametrize("degree", [1, 2, 3, 8])
def test_ranks_together_draw_what_plain_torch_draws(make, degree):
    plain = make(case_run(), 13, 21, name="x")
    fill_normal(plain, "weight", generator(1, "w"))
    fill_normal(plain, "bias", generator(1, "b"))

    def work(axis):
        layer = make(case_run(axis), 13, 21, name="x")
        fill_normal(layer, "weight", generator(1, "w"))
        fill_normal(layer, "bias", generator(1, "b"))
        return layer.weight.detach(), layer.bias.detach()

    weights, biases = zip(*launch(work, degree=degree, threads=1), strict=True)
    dim = 0 if make is column_linear else 1
    assert torch.equal(torch.cat(weights, dim), plain.weight)
    bias = torch.cat(biases) if make is column_linear else biases[0]
    assert torch.equal(bias, plain.bias)


def test_generators_differ_by_seed_and_name():
    draws = {
        torch.randn(1, generator=generator(seed, name)).item()
        for seed in (0, 1, 12345)
        for name in ("a", "b")
    }
    assert len(draws) == 6


def test_both_linears_start_from_the_same_numbers(case):
    column, row = case("linear-column"), case("linear-row")
    for place in (0, 1):
        assert column.tensors[place].sha256["1"] == row.tensors[place].sha256["1"]
    assert LINEAR_COLUMN.elementwise == LINEAR_ROW.elementwise


# Names


def test_a_case_is_found_by_name():
    assert find_case("linear-row") is LINEAR_ROW


def test_an_unknown_case_names_the_near_ones_and_all():
    with pytest.raises(UsageError, match=r"no case 'linear-rows'. Near names: linear-row"):
        find_case("linear-rows")
    with pytest.raises(UsageError, match=r"All cases: matmul-row, .*digits"):
        find_case("zzz")


# Digits


def test_digits_needs_its_extra():
    assert digits.DIGITS.extra == "demo"
    needed = {case.name: case.extra for case in all_cases() if case.extra}
    assert needed == {"digits": "demo", "llama": "hf", "qwen": "hf"}
    assert all(case.is_installed for case in all_cases() if not case.extra)


@pytest.fixture(scope="module")
def digits_proof():
    pytest.importorskip("sklearn", reason="needs the extra demo: scikit-learn")
    return prove_cases([digits.DIGITS], degrees=(1, 3), threads=1)


def test_ranks_that_are_processes_have_the_same_hashes(proof, digits_proof):
    cases = [*(find_case(name) for name in NOTEBOOKS), digits.DIGITS]
    report = prove_cases(cases, degrees=(1, 3), threads=1, engine="processes")
    assert report.proved, report.verdict()
    assert report.transport == ("gloo" if c_modules.shm() is None else "shm")
    threads = dataclasses.replace(proof, cases=(*proof.cases, *digits_proof.cases))
    comparison = compare_with(report, threads.as_dict())
    assert comparison.is_same
    assert comparison.compared == sum(len(case.tensors) for case in report.cases)


def test_digits_are_proved_for_all_their_epochs(digits_proof):
    assert digits_proof.proved, digits_proof.verdict()
    case = digits_proof.cases[0]
    names = {tensor.name: tensor for tensor in case.tensors}
    for epoch in range(1, digits.EPOCHS + 1):
        assert not names[f"epoch {epoch}: hidden.weight"].agreement_judged
    assert digits.EPOCHS >= 20
    assert names["hidden.weight"].agreement_judged
    assert names["output"].torch.allclose
    assert f"epoch {digits.EPOCHS}: hidden.weight.momentum_buffer" in names
    hashes = {names[f"epoch {e}: hidden.weight"].sha256["1"] for e in range(1, digits.EPOCHS + 1)}
    assert len(hashes) == digits.EPOCHS  # every epoch changes the weights
    (check,) = case.checks
    assert check.passed
    assert "test accuracy 9" in check.detail


def test_digits_are_split_by_the_random_seed():
    pytest.importorskip("sklearn", reason="needs the extra demo: scikit-learn")
    one, other = digits.load(1), digits.load(2)
    assert (len(one.train_y), len(one.test_y)) == (1438, 359)
    assert one.train_x.shape == (1438, 64)
    assert one.train_x.max() == 1.0
    assert one.train_x.min() == 0.0
    assert not torch.equal(one.test_y, other.test_y)
    again = torch.cat([y for _, y in digits.batches(one, 1, 1)])
    assert sorted(again.tolist()) == sorted(one.train_y.tolist())
    assert not torch.equal(again, torch.cat([y for _, y in digits.batches(one, 1, 2)]))


# torchrun

SCRIPT = """
import os
import torch
import shardproof as sp
from shardproof.errors import RankError
from shardproof.prover.cases import find_case
from shardproof.prover import prove_under_torchrun
from shardproof.prover.case import Case

def breaks_in_plain_torch(run):
    raise ValueError("planted in the reference")

def breaks_on_rank_1(run):
    run.record("x", torch.ones(1))
    if run.axis is not None and run.axis.rank == 1:
        raise ValueError("planted on rank 1")

axis = sp.Axis.from_env()

def prove(*cases):
    return prove_under_torchrun(cases, axis, threads=1)

def say(*words):
    # In one write: the ranks share the output, and without a buffer print writes word by word.
    line = " ".join(map(str, (axis.rank, *words))) + "\\n"
    os.write(1, line.encode())

try:
    prove(Case("broken", "", breaks_in_plain_torch))
except (ValueError, RankError) as error:
    say(type(error).__name__, error)
report = prove(*(find_case(name) for name in ("matmul-column", "mlp-gathered")))
shown = report if report is None else (report.proved, report.engine, report.degrees)
say(shown)
prove(Case("broken", "", breaks_on_rank_1))
"""


def test_torchruns_ranks_prove_and_a_failure_ends_them_all(tmp_path):
    """An error in plain torch is raised on all ranks; one on a rank ends the others."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )
    assert sorted(done.stdout.splitlines()) == [
        "0 (True, 'torchrun', (1, 2))",
        "0 ValueError planted in the reference",
        "1 None",
        "1 RankError rank 0 of 2 raised ValueError: planted in the reference",
    ]
    assert done.returncode == 1
    assert "ValueError: planted on rank 1" in done.stderr
