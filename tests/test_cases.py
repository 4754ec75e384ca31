import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fresh_process import run_fresh
from shardproof import core
from shardproof.axis import Axis
from shardproof.cases import all_cases, digits, find_case, mlp, notebooks
from shardproof.cases.cut_or_plain import column_linear, row_linear
from shardproof.cases.draws import fill_like_linear, fill_normal, generator
from shardproof.cases.linear import LINEAR_COLUMN, LINEAR_ROW
from shardproof.errors import UsageError
from shardproof.prover import compare_with, prove_cases
from shardproof.prover.accuracy import accuracy
from shardproof.prover.case import Trial
from shardproof.ranks import launch
from shardproof.scheme import Scheme

SEEDS = ["matmul-row", "matmul-column", "ffn", "linear-column", "linear-row", "mlp-gathered"]
DEGREES = (1, 2, 3, 4, 5, 8)


def trial(axis=None, seed=12345):
    return Trial(axis=axis, scheme=Scheme(), seed=seed, recorder=None)


# All of them


@pytest.fixture(scope="module")
def proof():
    return prove_cases([find_case(name) for name in SEEDS], degrees=DEGREES, threads=1)


@pytest.fixture(scope="module")
def case(proof):
    cases = {case.name: case for case in proof.cases}
    return cases.__getitem__


def test_every_case_is_there():
    others = ["attention", "digits", "gpt", "llama", "qwen"]
    assert [case.name for case in all_cases()] == [*SEEDS, *others]


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_case_is_proved_on_threads(name, proof, case):
    assert case(name).proved, proof.verdict()
    assert case(name).degrees == DEGREES


def test_seed_cases_have_the_same_hashes_as_processes(proof):
    report = prove_cases(
        [find_case(name) for name in SEEDS], degrees=(1, 3), threads=1, engine="processes"
    )
    assert report.proved, report.verdict()
    assert report.transport == ("gloo" if core.shm() is None else "shm")
    found = compare_with(report, proof.as_dict())
    assert found.is_same
    assert found.compared == sum(len(case.tensors) for case in proof.cases)


def test_ours_is_as_accurate_as_torch(proof):
    found = accuracy(proof.as_dict())
    assert len(found.ratios) > 20
    assert not found.without_number
    assert found.median <= 1.05


@pytest.mark.parametrize("seed", [0, 7])
def test_seed_cases_are_proved_at_other_seeds(seed):
    report = prove_cases([find_case(name) for name in SEEDS], degrees=(1, 3), threads=1, seed=seed)
    assert report.proved, report.verdict()


# One by one


def test_matmul_records_what_the_seed_speaks_of(case):
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


def test_linear_meets_the_seeds_elementwise_tolerance(case):
    for name in ("linear-column", "linear-row"):
        strict = {tensor.name for tensor in case(name).tensors if tensor.seed_allclose}
        assert strict == {"weight", "bias", "weight.grad", "bias.grad", "input.grad"}


def test_no_rank_of_linear_holds_more_than_its_share(case):
    full = 608 * 1024 * 4
    for name in ("linear-column", "linear-row"):
        for degree in (2, 3, 8):
            for rank in case(name).memory[str(degree)]:
                assert rank.largest_bytes <= math.ceil(8 / degree) / 8 * full


def test_linear_communicates_as_the_seed_says(case):
    column, row = (case(name).comm["2"] for name in ("linear-column", "linear-row"))
    assert {kind: n["calls"] for kind, n in column["forward"].items()} == {"all_gather": 1}
    assert {kind: n["calls"] for kind, n in column["backward"].items()} == {"all_reduce": 1}
    assert {kind: n["calls"] for kind, n in row["forward"].items()} == {"all_reduce": 1}
    assert {kind: n["calls"] for kind, n in row["backward"].items()} == {"all_gather": 1}


def test_mlp_outputs_are_those_that_the_seed_prints(case):
    names = [check.name for check in case("mlp-gathered").checks]
    assert names == [
        "outputs are the printed ones",
        "an all-gather after each layer",
        "dh is reduce-scattered",
    ]


def test_mlp_claims_the_printed_outputs_at_their_seed_alone():
    report = prove_cases([find_case("mlp-gathered")], degrees=(1, 2), threads=1, seed=1)
    assert report.proved
    assert "outputs are the printed ones" not in [c.name for c in report.cases[0].checks]


def test_an_output_that_is_not_the_printed_one_fails_the_check():
    wrong = torch.tensor(notebooks.MLP_OUTPUTS)
    wrong[3, 1] += 2e-4
    on_rank = trial(axis=Axis.solo())
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
        layer = column_linear(trial(), in_features, out_features, name="x")
        fill_like_linear(layer, own)
        assert torch.equal(layer.weight, reference.weight)
        assert torch.equal(layer.bias, reference.bias)


@pytest.mark.parametrize("make", [column_linear, row_linear])
@pytest.mark.parametrize("degree", [1, 2, 3, 8])
def test_ranks_together_draw_what_plain_torch_draws(make, degree):
    plain = make(trial(), 13, 21, name="x")
    fill_normal(plain, "weight", generator(1, "w"))
    fill_normal(plain, "bias", generator(1, "b"))

    def work(axis):
        layer = make(trial(axis), 13, 21, name="x")
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


def test_digits_have_the_same_hashes_as_processes(digits_proof):
    report = prove_cases([digits.DIGITS], degrees=(2,), threads=1, engine="processes")
    assert report.proved, report.verdict()
    found = compare_with(report, digits_proof.as_dict())
    assert found.is_same
    assert found.compared == len(digits_proof.cases[0].tensors)


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


def test_digits_are_split_by_the_seed():
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
import sys
import torch
import shardproof as sp
from shardproof.cases import find_case
from shardproof.prover import prove_under_torchrun
from shardproof.prover.case import Case

def broken(trial):
    if trial.axis is None and sys.argv[1] == "reference":
        raise ValueError("planted in the reference")
    trial.record("x", torch.ones(1))
    if trial.axis is not None and trial.axis.rank == 1 and sys.argv[1] == "rank":
        raise ValueError("planted on rank 1")

axis = sp.Axis.from_env()
names = ["matmul-column", "mlp-gathered"]
cases = [find_case(n) for n in names] if sys.argv[1] == "proof" else [Case("broken", "", broken)]
report = prove_under_torchrun(cases, axis, threads=1)
print(axis.rank, report if report is None else (report.proved, report.engine, report.degrees))
"""


def torchrun(tmp_path, what):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), what],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )


def test_torchruns_ranks_prove_and_rank_0_reports(tmp_path):
    done = torchrun(tmp_path, "proof")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 (True, 'torchrun', (1, 2))", "1 None"]


@pytest.mark.parametrize(
    ("what", "message"),
    [("reference", "planted in the reference"), ("rank", "planted on rank 1")],
)
def test_a_failure_under_torchrun_ends_all_ranks(tmp_path, what, message):
    done = torchrun(tmp_path, what)
    assert done.returncode == 1
    assert f"ValueError: {message}" in done.stderr
    if what == "reference":
        assert "RankError: rank 0 of 2 raised ValueError" in done.stderr


def test_leafwise_products_prove_the_cases_within_their_memory_too() -> None:
    program = (
        "from shardproof.cases import find_case\n"
        "from shardproof.prover import prove_cases\n"
        "names = ('matmul-row', 'ffn', 'mlp-gathered', 'attention')\n"
        "report = prove_cases([find_case(name) for name in names], degrees=(1, 2, 8))\n"
        "print(report.contract)\n"
        "print(report.verdict())\n"
    )
    contract, verdict = run_fresh(
        program, SHARDPROOF_BLAS="leafwise", SHARDPROOF_CORE="off"
    ).splitlines()[-2:]
    assert " leafwise " in contract
    assert verdict.startswith("Proved for 4 cases")
