"""`prove --layouts`: the same bits in every layout, and each planted fault named with its place."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from shardproof import batch_gradients, batch_leaves, comm, gradient_exchange
from shardproof.batch_gradients import BatchStep
from shardproof.cli.main import main
from shardproof.cli.prove_layouts import parse_layouts
from shardproof.cut import module_calls
from shardproof.data_parallel_step import DataParallelStep
from shardproof.errors import UsageError
from shardproof.gradient_buckets import LOSS, Bucket
from shardproof.gradient_exchange import GradientExchange
from shardproof.ops.dropout import dropout
from shardproof.ops.tokens import TokenCut
from shardproof.prover import rank_layouts as layouts
from shardproof.prover.cases import find_case
from shardproof.prover.rank_layouts import (
    ALONE,
    LayoutReport,
    RankLayout,
    all_layouts,
    prove_layouts,
    sampled_layouts,
)
from shardproof.scheme import Scheme
from shardproof.tree import Node, nodes_of_run

SCHEME = Scheme(batch_leaves=8)
TWO = RankLayout(1, 2, 1)
OF_TOKENS = RankLayout(2, 1, 1, sequence=True)


def prove(*some: RankLayout, case: str = "gpt", **options: Any) -> LayoutReport:
    """A short proof."""
    options = {"steps": 1, "scheme": SCHEME, **options}
    return prove_layouts([find_case(case)], some, **options)


def test_the_sets_of_layouts() -> None:
    every = all_layouts()
    assert every[0] == ALONE
    assert len(set(every)) == len(every) == (1 + 2 * 4) * 4 * 3
    some = sampled_layouts()
    assert some[0] == ALONE
    assert len(some) == layouts.SAMPLE
    assert {each.tp for each in some} == set(layouts.TP_SIZES)
    assert {each.dp for each in some} == set(layouts.DP_SIZES)
    assert {each.accumulate for each in some} == set(layouts.ACCUMULATIONS)
    assert parse_layouts("sample") == some
    assert parse_layouts("full") == every
    assert parse_layouts("tp=2:dp=1,3") == (ALONE, RankLayout(2, 1), RankLayout(2, 3))
    assert parse_layouts("tp=1,2:sequence=on,off") == (ALONE, RankLayout(2), OF_TOKENS)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' names no dim of a layout"),
        ("tp", "'tp' has something else than positive numbers"),
        ("tp=2,x", "'tp=2,x' has something else than positive numbers"),
        ("tp=0", "positive numbers"),
        ("sequence=1", "'sequence=1' has something else than off and on"),
        ("pp=2", "'pp=2' names no dim"),
        ("tp=1000", "the largest of 1000 ranks"),
    ],
)
def test_a_wrong_set_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as error:
        parse_layouts(text)
    assert "--layouts" in str(error.value)


@pytest.mark.parametrize("case", ["gpt", "llama", "qwen"])
def test_every_layout_has_the_same_bits(case: str) -> None:
    report = prove(
        RankLayout(2, 2, 1, True),
        RankLayout(3, 1, 2, True),
        RankLayout(1, 3, 2),
        case=case,
        steps=2,
    )
    assert report.proved, report.verdict()
    assert len(report.cases[0].hashes) > 100
    assert "batch-leaves=8" in report.contract
    assert 0 < report.cases[0].torch_difference < 1e-12


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_layouts_on_processes(transport: str) -> None:
    report = prove(RankLayout(2, 2, 1), engine="processes", transport=transport)
    assert report.proved, report.verdict()
    assert report.transport == transport


# ---- planted faults


def _averaged(patch: pytest.MonkeyPatch) -> None:
    """Gradients averaged by the number of ranks, beside the division by the count."""
    original = GradientExchange.finish

    def finish(self: GradientExchange) -> list[tuple[Bucket, Tensor]]:
        return [(bucket, flat / self._axis.size) for bucket, flat in original(self)]

    patch.setattr(GradientExchange, "finish", finish)


def _each_node(
    patch: pytest.MonkeyPatch, change: Callable[[Any, dict[Node, Tensor]], dict[Node, Tensor]]
) -> None:
    original = comm.start_all_reduce_nodes

    def start(nodes: Mapping[Node, Tensor], axis: Any, **options: Any) -> comm.StartedSum:
        return original(change(axis, dict(nodes)) if axis.size > 1 else nodes, axis, **options)

    patch.setattr(gradient_exchange.comm, "start_all_reduce_nodes", start)


def _twice(patch: pytest.MonkeyPatch) -> None:
    """A leaf counted twice: rank 1 counts its last node again."""

    def change(axis: Any, nodes: dict[Node, Tensor]) -> dict[Node, Tensor]:
        last = list(nodes)[-1]
        return nodes | ({last: nodes[last] * 2} if axis.rank else {})

    _each_node(patch, change)


def _missing(patch: pytest.MonkeyPatch) -> None:
    """A node of one rank is missing."""

    def change(axis: Any, nodes: dict[Node, Tensor]) -> dict[Node, Tensor]:
        last = list(nodes)[-1]
        return nodes | ({last: torch.zeros_like(nodes[last])} if axis.rank else {})

    _each_node(patch, change)


def _before_total(patch: pytest.MonkeyPatch, change: Callable[[BatchStep], None]) -> None:
    original = DataParallelStep._end

    def end(self: DataParallelStep, error: Any) -> Any:
        change(self._step)
        return original(self, error)

    patch.setattr(DataParallelStep, "_end", end)


def _scale(step: BatchStep, node: Node, scale: float) -> None:
    for sums in step.sums:
        value = sums[node]
        sums[node] = None if value is None else value * scale


def _mean_of_ranks(patch: pytest.MonkeyPatch) -> None:
    """The mean of each rank's mean: each rank divides by its own count."""

    def change(step: BatchStep) -> None:
        for node in step.sums[LOSS]:
            _scale(step, node, 1 / step.count)
        step.count = 1

    _before_total(patch, change)


_LOCAL_NORM = 300  # below the norm of a rank's sums


def _clipped_alone(patch: pytest.MonkeyPatch) -> None:
    """Each rank clips what it has computed, before the sum over the ranks."""

    def change(step: BatchStep) -> None:
        for node in step.sums[LOSS]:
            every = [sums[node] for sums in step.sums[:LOSS]]
            squares = [each.square().sum() for each in every if each is not None]
            norm = torch.stack(squares).sum().sqrt().item()
            _scale(step, node, min(1.0, _LOCAL_NORM / norm))

    _before_total(patch, change)


def _in_order_of_arrival(patch: pytest.MonkeyPatch) -> None:
    """Each pass is added to the sum of those before it."""

    def put(self: BatchStep, place: int, node: Node, value: Tensor | None) -> None:
        if place != LOSS and value is not None:
            self._has_gradient[place] = True
        run = self.cut.run(0 if node[0] in self.cut.run(0) else 1)
        for whole in nodes_of_run(self.cut.num_leaves, run):
            if whole[0] <= node[0] < whole[1]:
                sums = self.sums[place]
                before = sums.get(whole)
                sums[whole] = value if before is None else batch_gradients._plus(before, value)

    patch.setattr(BatchStep, "put", put)


def _drawn_by_rank(patch: pytest.MonkeyPatch) -> None:
    """Dropout drawn by the leaf's number on its rank, not in the batch."""
    local = threading.local()
    original = DataParallelStep._prepare

    def prepare(self: DataParallelStep) -> None:
        original(self)
        local.first = self._passes[0].start

    def numbered(leaves: range, sizes: tuple[int, ...]) -> batch_leaves.BatchLeaves:
        start = leaves.start - local.first
        return batch_leaves.BatchLeaves(range(start, start + len(leaves)), sizes)

    patch.setattr(DataParallelStep, "_prepare", prepare)
    patch.setattr(batch_gradients, "BatchLeaves", numbered)


def _tokens_not_summed(patch: pytest.MonkeyPatch) -> None:
    """Gradients of norms' weights are of a rank's own tokens, and not summed over the ranks."""

    def sum_rows(self: TokenCut, terms: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        return terms.sum(0, dtype=dtype)

    patch.setattr(TokenCut, "sum_rows", sum_rows)


def _drawn_by_own_token(patch: pytest.MonkeyPatch) -> None:
    """Dropout drawn by a token's number on its rank."""

    def dropout_part(x: Tensor, p: float, key: Any, **_: Any) -> Tensor:
        return dropout(x, p, key)

    patch.setattr(module_calls, "dropout_part", dropout_part)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, str]] = {
    _averaged: ("gpt", "step 1: loss"),
    _twice: ("gpt", "step 1: loss"),
    _missing: ("gpt", "step 1: loss"),
    _mean_of_ranks: ("gpt", "step 1: loss"),
    _clipped_alone: ("gpt", "step 1: "),
    _in_order_of_arrival: ("gpt", "step 1: "),
    _drawn_by_rank: ("llama", "step 1: loss"),
    _tokens_not_summed: ("gpt", "step 1: norm."),
    _drawn_by_own_token: ("gpt", "step 1: loss"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda each: each.__name__)
def test_a_planted_fault_is_named_with_tensor_and_layout(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    case, tensor = FAULTS[plant]
    layout = OF_TOKENS if "token" in plant.__name__ else TWO
    report = prove(layout, case=case)
    assert not report.proved
    run = report.cases[0].runs[1]
    assert run.differing[0].startswith(tensor), run.differing[:3]
    assert f"tensor {run.differing[0]!r} is the first" in report.verdict()
    assert f"in layout {layout} than in tp 1 x dp 1" in report.verdict()


def test_a_fault_of_all_layouts_is_found_by_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count has one too many in every pass of every layout."""
    original = layouts.LayoutTraining.loss_of

    def loss_of(self: Any, *args: Any) -> tuple[Tensor, int]:
        loss, count = original(self, *args)
        return loss, count + 1

    monkeypatch.setattr(layouts.LayoutTraining, "loss_of", loss_of)
    report = prove(TWO)
    assert not any(run.differing for run in report.cases[0].runs)
    assert "off plain torch in fp64" in report.verdict()


# ---- the command


def _command(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, ["prove", *words])


def test_the_command_prints_a_table_and_writes_json_and_a_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "report.json", tmp_path / "map.svg"
    result = _command(
        "--case", "gpt", "--layouts", "tp=1,2:dp=2", "--steps", "1",
        "--json", str(path), "--plot", str(picture),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "every tensor has the same bits in 3 layouts" in result.output
    report = json.loads(path.read_text())
    assert report["proved"]
    assert [each["ranks"] for each in report["cases"][0]["layouts"]] == [1, 2, 4]
    assert "dp | accumulate" in picture.read_text()


def test_the_command_ends_with_1_at_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    _twice(monkeypatch)
    result = _command("--case", "gpt", "--layouts", "dp=2", "--steps", "1")
    assert result.exit_code == 1
    assert "Not proved: in case gpt, tensor 'step 1: loss' is the first" in result.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--layouts", "--degrees", "1,2"], "--degrees does not go with --layouts"),
        (["--layouts", "--resume"], "--resume does not go with --layouts"),
        (["--layouts", "--numerics", "native"], "--numerics native does not go with"),
        (["--layouts", "--case", "ffn"], "case 'ffn' does not train a language model"),
        (["--layouts", "tp=16"], "leaves=8"),
        (["--layouts", "dp=9", "--case", "gpt"], "9"),
        (["--layouts", "dp=2", "--transport", "shm", "--engine", "threads"], "--transport shm"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], text: str) -> None:
    result = _command(*words)
    assert result.exit_code == 2
    assert text in " ".join(result.output.split())
