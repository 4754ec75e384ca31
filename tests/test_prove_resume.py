"""`prove --resume`: what is resumed has the bits of the whole run, or a fault is named."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from shardproof.checkpoint import load as loading
from shardproof.checkpoint import save as saving
from shardproof.checkpoint import writing
from shardproof.checkpoint.entries import Entry
from shardproof.cli.main import main
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases.matmul_cases import MATMUL_ROW
from shardproof.prover.proof import prove_cases
from shardproof.prover.recording import run_references
from shardproof.prover.resuming import ResumeReport, prove_resume
from shardproof.prover.training import Batch, Training

IDS = torch.arange(12).reshape(2, 6) % 13
STEPS = 4


class Model(nn.Module):
    """An embedding, dropout, a norm with a buffer, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.up_again, self.down_again = nn.Linear(8, 20), nn.Linear(20, 8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.dropout(self.down(torch.relu(self.up(x)))) * self.scale
        x = x + self.down_again(torch.relu(self.up_again(x)))
        return self.head(x)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make()


WHOLE = seeded(Model)


def build(axis: sp.Axis | None) -> nn.Module:
    model = copy.deepcopy(WHOLE)
    return model if axis is None else sp.parallelize(model, None, axis, inputs=(IDS,))


def loss(run: CaseRun, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target)


CASE = Case(
    "small",
    "a small language model",
    Training(
        lambda run: build(run.axis),
        lambda run: Batch((IDS,), IDS.roll(1).flatten()),
        loss,
        lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        steps=STEPS,
        measures_creation=False,
    ),
)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references") / "small"
    run_references(CASE, scheme=None, seed=None, directory=folder)
    return folder


def resumed(references: Path, folder: Path, degrees: Sequence[int] = (1, 2)) -> ResumeReport:
    def run_ranks(degree: int, work: Callable[[Any], Any]) -> Sequence[Any]:
        return sp.launch(work, degree=degree, compare_inputs=False)

    return prove_resume(
        CASE, degrees, run_ranks, folder=folder, announce=lambda text: None, scheme=None, seed=None,
        directory=references,
    )  # fmt: skip


def test_what_is_resumed_is_the_whole_run(references: Path, tmp_path: Path) -> None:
    report = resumed(references, tmp_path, (1, 2, 3))
    assert report.fault == ""
    assert report.pairs == ((3, 1), (1, 2), (2, 3))
    assert report.num_tensors > 60


def moments_dropped(patch: pytest.MonkeyPatch) -> None:
    def load_into(optimizer: Any, state: dict[str, Any]) -> None:
        optimizer.load_state_dict({**state, "state": {}})

    patch.setattr(loading, "load_into", load_into)
    patch.setattr(loading, "_keep_forms", lambda *_: None)


def moments_of_another_parameter(patch: pytest.MonkeyPatch) -> None:
    original = loading.load_into

    def load_into(optimizer: Any, state: dict[str, Any]) -> None:
        by_shape: dict[Any, list[int]] = {}
        for number, each in state["state"].items():
            by_shape.setdefault(tuple(each["exp_avg"].shape), []).append(number)
        first, second = next(numbers for numbers in by_shape.values() if len(numbers) > 1)[:2]
        moments = state["state"]
        moments[first], moments[second] = moments[second], moments[first]
        original(optimizer, state)

    patch.setattr(loading, "load_into", load_into)


def step_counter_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original = loading._result

    def result(*arguments: Any) -> Any:
        loaded = original(*arguments)
        return dataclasses.replace(loaded, step=loaded.step + 1)

    patch.setattr(loading, "_result", result)


def dropout_from_the_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loading, "_draws", lambda *_: {})


def shard_at_a_wrong_offset(patch: pytest.MonkeyPatch) -> None:
    original = writing.PartWriter._write

    def write(self: Any, start: int, x: Tensor) -> None:
        moved = 4 if self._axis.rank == 1 and "model" in self._path.name else 0
        original(self, start - moved, x)

    patch.setattr(writing.PartWriter, "_write", write)


def tied_weight_saved_twice(patch: pytest.MonkeyPatch) -> None:
    original = saving.weights_of

    def weights_of(model: nn.Module) -> list[Entry]:
        entries = original(model)
        tied = next(entry for entry in entries if entry.name == "embedding.weight")
        return [*entries, dataclasses.replace(tied, name="head.weight")]

    patch.setattr(saving, "weights_of", weights_of)


FAULTS = {
    moments_dropped: "tensor saved: embedding.weight.exp_avg is missing",
    moments_of_another_parameter: r"tensor saved: .*\.exp_avg is the first with other bits",
    step_counter_off_by_one: "tensor step 3: output is missing",
    dropout_from_the_start: r"tensor saved: draws of dropout\S* is the first with other bits",
    shard_at_a_wrong_offset: r"tensor '.*' of model.safetensors has other bytes in the checkpoint "
    "of degree 2 than in that of degree 1",
    tied_weight_saved_twice: "has head.weight, for which there is no parameter",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named(
    fault: Callable[[pytest.MonkeyPatch], None],
    references: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    assert re.search(FAULTS[fault], resumed(references, tmp_path).fault)


PLAIN = seeded(lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)))


def build_plain(axis: sp.Axis | None) -> nn.Module:
    model, styles = copy.deepcopy(PLAIN), {"0": "colwise", "2": "rowwise"}
    return model if axis is None else sp.parallelize(model, styles, axis)


def proof_of_plain(*, resume: bool) -> Any:
    return sp.prove(
        build_plain, F.mse_loss, (torch.ones(4, 6), torch.zeros(4, 3)), degrees=(1, 2), steps=3,
        audit_creation=False, resume=resume,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )  # fmt: skip


def test_a_report_says_it_and_a_fault_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    report = proof_of_plain(resume=True)
    assert report.proved, report.verdict()
    assert "2 runs had the bits of the unbroken run." in report.verdict()
    assert report.as_dict()["resumed"][0]["pairs"] == [[2, 1], [1, 2]]
    moments_dropped(monkeypatch)
    report = proof_of_plain(resume=True)
    assert not report.proved
    assert report.verdict().startswith(
        "Not proved: in case model, resumed at degree 1 from the checkpoint of degree 2: tensor "
        "saved: 0.weight.momentum_buffer is missing"
    )
    assert "resumed" not in proof_of_plain(resume=False).as_dict()


def test_weights_that_are_not_loaded_are_noticed_even_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model has the right weights when it is built; the prover overwrites them."""
    monkeypatch.setattr(loading, "read", lambda matches: None)
    report = prove_cases([MATMUL_ROW], degrees=(1, 2), resume=True)
    assert "tensor saved: weight is the first with other bits" in report.verdict()


def test_the_command_resumes_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "report.json"
    command = ["prove", "--case", "ffn", "--case", "matmul-row", "--degrees", "1,3", "--resume"]
    result = CliRunner().invoke(main, [*command, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "4 runs had the bits of the unbroken run" in result.stdout
    assert "resumed: ffn, degrees 3 to 1, 1 to 3: the bits of the unbroken run" in result.stdout
    assert [each["same"] for each in json.loads(out.read_text())["resumed"]] == [True, True]
