"""Under which contract a report speaks: what the layers and the ranks were, not what was hoped."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardproof as sp
from fresh_process import run_fresh
from planted import IN, OUT, block_builder, linear
from shardproof.axis import Axis
from shardproof.errors import DegreeError, MismatchError, UsageError
from shardproof.mistakes.trainings import BATCH
from shardproof.numerics import mode
from shardproof.prover import prove_cases
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.judge import agreed_contract
from shardproof.prover.proof import coming_contract, threads_of_ranks
from shardproof.prover.recording import RankResult
from shardproof.prover.report import Report
from shardproof.scheme import Scheme

NATIVE = Scheme(numerics="native")


def here() -> int:
    """This thread's number of threads, for ranks whose contract is compared with its own."""
    return torch.get_num_threads()


def prove_row(
    dtype: torch.dtype = torch.float32,
    *,
    scheme: Scheme = Scheme(),  # noqa: B008 - frozen
    **options: Any,
) -> Report:
    """Prove one row-parallel layer of a dtype; its scheme is not told to the proof."""
    whole = linear(IN, OUT, seed=1).to(dtype)

    def build(axis: Axis | None) -> nn.Module:
        if axis is None:
            return whole
        return sp.RowParallelLinear.from_linear(
            whole, axis=axis, name="row", input_is_parallel=False, scheme=scheme
        )

    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(BATCH, size, generator=generator).to(dtype) for size in (IN, OUT))
    return sp.prove(build, F.mse_loss, (x, target), **{"degrees": (1, 2)} | options)


def test_the_contract_names_the_layers_scheme_and_dtype() -> None:
    report = prove_row(torch.float64, scheme=Scheme(leaves=4, seed=7), threads=here())
    assert report.proved, report.verdict()
    assert report.contract == mode.contract(Scheme(leaves=4), torch.float64)
    assert (report.numerics, report.leaves, report.seed) == ("invariant", 4, 7)


def test_native_layers_are_not_reported_as_invariant() -> None:
    report = prove_row(scheme=NATIVE)
    assert not report.identical
    assert report.contract == mode.contract(NATIVE)
    assert report.numerics == "native"


def test_the_thread_count_is_that_of_the_ranks() -> None:
    """bf16 has no strict mode, so that threads belong to its contract."""
    report = prove_row(torch.bfloat16, threads=3)
    assert report.identical, report.verdict()
    assert f" leafwise threads=3 bf16 torch={torch.__version__}" in report.contract


def test_layers_of_two_dtypes_have_a_contract_of_two_lines() -> None:
    def widen(block: nn.Module, axis: Axis) -> None:
        block.down.double()
        block.activation = lambda x: torch.relu(x).double()

    def build(axis: Axis | None) -> nn.Module:
        block = block_builder(change=widen)(axis)
        if axis is None:
            widen(block, Axis.solo())
        return block

    batch = torch.ones(BATCH, IN), torch.zeros(BATCH, OUT, dtype=torch.float64)
    options = {"degrees": (1, 2), "audit_creation": False, "threads": here()}
    report = sp.prove(build, F.mse_loss, batch, **options)
    lines = [mode.contract(Scheme(), dtype) for dtype in (torch.float32, torch.float64)]
    assert report.contract == "; ".join(lines)


def test_ranks_have_as_many_threads_at_every_degree() -> None:
    assert threads_of_ranks(5, (1, 2)) == 5
    assert threads_of_ranks(None, (1,)) == torch.get_num_threads()
    assert threads_of_ranks(None, (1, 64)) == 1


def test_leafwise_products_are_reported_with_the_threads_of_the_ranks(tmp_path: Path) -> None:
    """Under another number of threads a report is refused, before the work, and only then."""
    code = f"""
        from click.testing import CliRunner
        from shardproof.cli.main import main
        from shardproof.prover.cases import find_case
        from shardproof.prover import prove_cases
        import json

        def run(*arguments):
            command = ["prove", "--case", "ffn", "--degrees", "1,2", *arguments]
            result = CliRunner().invoke(main, command)
            return result.exit_code, "[0/3]" in result.stderr

        path = {str(tmp_path / "report.json")!r}
        print(prove_cases([find_case("ffn")], degrees=(1, 2)).proved)
        print(run("--threads", "3", "--json", path))
        print(json.load(open(path))["contract"])
        print(run("--threads", "3", "--against", path), run("--threads", "2", "--against", path))
        """
    lines = run_fresh(code, SHARDPROOF_BLAS="leafwise", OMP_NUM_THREADS="2").splitlines()
    assert lines.pop(2).startswith("tree-3 leaves=8 leafwise threads=3 small=")
    assert lines == ["True", "(0, True)", "(0, True) (2, False)"]


def test_a_case_without_a_cut_module_has_the_contract_of_its_scheme() -> None:
    def record(trial: CaseRun) -> None:
        trial.record("x", torch.ones(2))

    case = Case("plain", "", record)
    report = prove_cases([case], degrees=(1, 2), scheme=Scheme(leaves=3), threads=here())
    assert report.contract == mode.contract(Scheme(leaves=3))
    assert coming_contract(Scheme(leaves=3), here()) == report.contract


# Ranks, degrees and cases that disagree


def result(rank: int = 0, **changes: Any) -> RankResult:
    made = RankResult(rank, (), (), 0, (), 0, {}, 0.0, Scheme(), "tree-3 threads=1")
    return dataclasses.replace(made, **changes)


def test_one_contract_is_agreed() -> None:
    results = {"a": {1: [result()], 2: [result(), result(1)]}, "b": {1: [result()]}}
    assert agreed_contract(results) == (Scheme(), "tree-3 threads=1")


OTHER = {"contract": "tree-3 threads=2"}


@pytest.mark.parametrize(
    ("results", "place"),
    [
        ({"a": {1: [result()], 2: [result(), result(1, **OTHER)]}}, "rank 1 of 2 in case 'a'"),
        ({"a": {1: [result()], 2: [result(**OTHER)]}}, "rank 0 of 2 in case 'a'"),
        ({"a": {1: [result()]}, "b": {1: [result(**OTHER)]}}, "rank 0 of 1 in case 'b'"),
    ],
    ids=["ranks", "degrees", "cases"],
)
def test_two_contracts_are_an_error(results: Any, place: str) -> None:
    message = (
        "rank 0 of 1 in case 'a' ran under the contract 'tree-3 threads=1', "
        f"{place} under 'tree-3 threads=2', and bits are compared under one alone"
    )
    with pytest.raises(MismatchError, match=message):
        agreed_contract(results)


def test_two_schemes_under_one_contract_are_an_error() -> None:
    results = {"a": {1: [result()], 2: [result(scheme=Scheme(seed=1))]}}
    with pytest.raises(MismatchError, match=r"under the scheme .*seed=0\)\", .*seed=1"):
        agreed_contract(results)


def test_a_dtype_that_depends_on_the_degree_is_an_error() -> None:
    def build(axis: Axis | None) -> nn.Module:
        whole = linear(IN, OUT, seed=1)
        if axis is None:
            return whole
        layer = sp.ColumnParallelLinear.from_linear(whole, axis=axis, gather_output=True)
        return layer.double() if axis.size == 2 else layer

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, target.to(output.dtype))

    class Casting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x.to(next(self.parameters()).dtype))
            return y

    batch = torch.ones(BATCH, IN), torch.zeros(BATCH, OUT)
    with pytest.raises(MismatchError, match=r"fp32 .*rank 0 of 2 in case 'model' under .* fp64"):
        sp.prove(lambda axis: Casting(build(axis)), loss, batch, degrees=(1, 2))


# Schemes of layers and of the proof


def test_a_layer_of_another_scheme_is_an_error() -> None:
    message = (
        r"layer 'up' has Scheme\(leaves=4, .*\), the proof has Scheme\(leaves=8, .*\), and a "
        "report speaks of one"
    )
    with pytest.raises(UsageError, match=message):
        sp.prove(
            block_builder(scheme=Scheme(leaves=4)),
            F.mse_loss,
            (torch.ones(BATCH, IN), torch.zeros(BATCH, OUT)),
            degrees=(1,),
            scheme=Scheme(),
        )


def test_two_layers_of_unlike_schemes_are_an_error() -> None:
    def change(block: nn.Module, axis: Axis) -> None:
        block.down = sp.RowParallelLinear.from_linear(
            linear(48, OUT, seed=3), axis=axis, name="down", scheme=NATIVE
        )

    with pytest.raises(UsageError, match=r"layer 'down' has .*native.*, layer 'up' has .*invaria"):
        sp.prove(
            block_builder(change=change),
            F.mse_loss,
            (torch.ones(BATCH, IN), torch.zeros(BATCH, OUT)),
            degrees=(1,),
        )


def test_more_leaves_serve_more_degrees() -> None:
    report = prove_row(scheme=Scheme(leaves=16), degrees=(1, 16), threads=1)
    assert report.proved, report.verdict()
    assert (report.degrees, report.leaves) == ((1, 16), 16)


def test_a_plans_leaves_serve_its_degrees() -> None:
    plan = sp.Plan({"0": "colwise", "2": "rowwise"}, scheme=Scheme(leaves=16))

    def build(axis: Axis | None) -> nn.Module:
        model = nn.Sequential(linear(IN, 40, seed=1), nn.ReLU(), linear(40, OUT, seed=2))
        return model if axis is None else sp.parallelize(model, plan, axis)

    batch = torch.ones(BATCH, IN), torch.zeros(BATCH, OUT)
    report = sp.prove(build, F.mse_loss, batch, degrees=(1, 16), threads=1, audit_creation=False)
    assert report.proved, report.verdict()


def test_the_layers_refuse_a_degree_beyond_their_leaves() -> None:
    with pytest.raises(DegreeError, match="degree 3 exceeds leaves=2"):
        prove_row(scheme=Scheme(leaves=2), degrees=(3,))
