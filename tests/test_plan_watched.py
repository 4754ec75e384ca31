"""`shardproof plan` of models that are watched: text, data, functions of one's own, and errors."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import shardproof as sp
from shardproof.cli.main import main
from shardproof.errors import PlanError
from shardproof.plans.plan_text import by_reason
from shardproof.plans.watched_plan import WatchedPlan

OWN = '''
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 40), nn.Linear(40, dim)

    def forward(self, x):
        q, k, v = self.c_attn(self.norm(x)).split(x.shape[-1], dim=2)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))

def build():
    print("a line of the user's own")
    return nn.Sequential(Block(), Block()), torch.randn(2, 5, 24)

def wants(size): ...
def fails(): raise RuntimeError("no such data")
def alone(): return nn.Linear(2, 2)
def nothing(): return None
def odd_inputs(): return nn.Linear(2, 2), 7
def wrong_inputs(): return nn.Linear(2, 2), torch.ones(1, 3)
number = 3
'''  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_model_file.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("own_model", "broken", "leaves_at_once")):
            del sys.modules[name]


def run(*arguments: str, columns: int = 120) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["plan", *arguments])


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("given", ["own_model_file.py:build", "own_model_file:build"])
def test_a_function_of_ones_own_is_planned(given: str) -> None:
    result = run(given, "--degree", "2")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == "== Sequential at degree 2"
    assert lines[1] == f"{given}, 8 leaves, watched"
    assert "a line of the user's own" in result.stderr
    assert "a line of the user's own" not in result.stdout
    table = [" ".join(line.split()) for line in lines]
    start = table.index("column and row: 3 units, 3 leaves")
    assert (
        table[start + 1] == "0-1.c_attn.weight 0 72x24 48x24 | 24x24 backward 2 all_reduce 1.9 KiB"
    )
    assert table[start + 3] == "0-1.c_proj.weight 1 24x24 24x16 | 24x8 forward 2 all_reduce 1.9 KiB"
    assert "column and row: 40 units, 8 leaves" in table
    assert lines[-2].startswith("a step with these inputs, forward: 4 all_reduce of 3.8 KiB")


@pytest.mark.parametrize("option", ["--batch", "--length"])
def test_the_size_of_an_example_is_refused_where_a_function_gives_one(option: str) -> None:
    said = refused("own_model_file.py:build", "--degree", "2", option, "4")
    assert "own_model_file.py:build returns its own. Leave both out." in " ".join(said.split())


def test_a_file_without_a_function_is_told_from_a_directory() -> None:
    said = refused("own_model_file.py", "--degree", "2")
    assert "is a file of Python, without a function" in " ".join(said.split())


def test_the_docs_show_what_the_command_prints(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "plans.md").read_text()
    (code,) = re.findall(r"```python\n# mymodel.py\n(.*?)```", page, re.DOTALL)
    ((command, shown),) = re.findall(
        r"^\$ shardproof plan (mymodel.*)\n((?:.*\n)*?)```", page, re.MULTILINE
    )
    (tmp_path / "mymodel.py").write_text(code)
    assert run(*command.split(), columns=110).stdout == shown


def test_ranks_without_work_are_named() -> None:
    result = run("own_model_file.py:build", "--degree", "5")
    assert "column and row: 3 units, 3 leaves, ranks 3, 4 idle" in result.stdout
    assert "idle: ranks 3, 4 own nothing of 0-1.c_attn.weight, and what is cut with it" in (
        result.stdout
    )


def test_narrow_screens_lose_columns_and_no_names() -> None:
    result = run("own_model_file.py:build", "--degree", "2", columns=80)
    assert "0-1.c_attn.weight" in result.stdout
    assert "72x24" not in result.stdout


def test_the_file_has_the_plan_and_the_collectives_of_every_module(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    result = run("own_model_file.py:build", "--degree", "3", "--json", str(target))
    assert result.exit_code == 0, result.output
    data = json.loads(target.read_text())
    assert data["directory"] == "own_model_file.py:build"
    assert data["degree"] == 3
    forward = [each for each in data["collectives"] if each["direction"] == "forward"]
    assert [each["module"] for each in forward] == ["0.c_proj", "0.down", "1.c_proj", "1.down"]
    for direction in ("forward", "backward"):
        said = [each for each in data["collectives"] if each["direction"] == direction]
        ledger = data["comm"][0][direction]
        assert sum(each["calls"] for each in said) == sum(x["calls"] for x in ledger.values())
        assert sum(each["message_bytes"] for each in said) == sum(
            x["message_bytes"] for x in ledger.values()
        )


WRONG: dict[str, tuple[str, str]] = {
    "no file": ("gone.py:build", "there is no file gone.py"),
    "no module": ("own_model_gone:build", "there is no module own_model_gone here"),
    "no function": ("own_model_file.py:bild", "has no function 'bild'; near names: build"),
    "no name": ("own_model_file.py:", "names no function in a module"),
    "no callable": ("own_model_file.py:number", "is 3, no function"),
    "arguments": ("own_model_file.py:wants", "wants arguments (size)"),
    "raises": (
        "own_model_file.py:fails",
        "raised RuntimeError: no such data in line 25. Correct it",
    ),
    "no inputs": ("own_model_file.py:alone", "returns a Linear without inputs"),
    "nothing": ("own_model_file.py:nothing", "returns None. Return (model, inputs)"),
    "odd inputs": ("own_model_file.py:odd_inputs", "returns inputs 7. Return what forward takes"),
    "wrong inputs": ("own_model_file.py:wrong_inputs", "the model's own forward fails with these"),
    "a file that is no code": ("broken_code.py:build", "cannot be imported: SyntaxError"),
    "a file that lacks another": (
        "broken_import.py:build",
        "cannot be imported: ModuleNotFoundError: No module named 'own_model_missing'",
    ),
    "a file that exits": ("leaves_at_once.py:build", "cannot be imported: SystemExit: 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_can_be_wrong_is_said(what: str, tmp_path: Path) -> None:
    (tmp_path / "broken_code.py").write_text("def build(:")
    (tmp_path / "broken_import.py").write_text("import own_model_missing")
    (tmp_path / "leaves_at_once.py").write_text("raise SystemExit(0)")
    given, text = WRONG[what]
    assert text in refused(given, "--degree", "2")


def test_one_file_for_two_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "both")
    said = refused("own_model_file.py:build", "--degree", "2", "--html", path, "--json", path)
    assert "--html and --json are both" in said


def test_reasons_that_differ_in_numbers_are_one() -> None:
    reasons = {f"h.{n}.norm.weight": f"'mean' in 'h.{n}.norm' adds up over it." for n in range(80)}
    assert by_reason(reasons) == [
        ("h.0-79.norm.weight", "'mean' in 'h.0-79.norm' adds up over it.")
    ]


class Small(nn.Module):
    """Layers that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_alike_share_what_is_found_out_for_one() -> None:
    made = sp.plan(Small(), degree=2, inputs=torch.ones(3, 8))
    assert isinstance(made, sp.WatchedPlan)
    first, second = (made.cuts[f"layers.{n}.0.weight"][1].shared for n in (0, 2))
    assert first is second


# -- models of transformers ------------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path: Path) -> str:
    config = {
        "model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 40, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "vit")


def test_a_directory_of_any_kind_of_model(vit: str) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    result = run(vit, "--degree", "2", "--batch", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("== ViTForImageClassification at degree 2")
    assert "carries no tp_plan" in result.stdout
    assert "inputs that the config gives: pixel_values (3, 3, 16, 16), labels (3,)" in result.stdout


def test_a_directory_is_watched_on_demand(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from families import config  # noqa: PLC0415 - imports transformers

    made = config("Llama", architectures=["LlamaForCausalLM"], num_hidden_layers=2)
    made.save_pretrained(tmp_path / "llama")
    given = (str(tmp_path / "llama"), "--degree", "2", "--batch", "2", "--length", "16")
    served, watched = run(*given), run(*given, "--watch")
    assert ", watched" not in served.stdout
    assert "8 leaves, watched" in watched.stdout
    counts = "forward 1 all_gather (3.0 KiB) and 5 all_reduce (20.0 KiB)"
    assert counts in served.stdout
    assert "forward: 1 all_gather of 3.0 KiB, 5 all_reduce of 20.0 KiB" in watched.stdout


def test_examples_of_configs() -> None:
    transformers: Any = pytest.importorskip("transformers", reason="hf is not installed")
    from shardproof.hf.example import examples  # noqa: PLC0415

    with torch.device("meta"):
        bart = transformers.BartForConditionalGeneration(
            transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=40)
        )
        whisper = transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, vocab_size=40, max_source_positions=20,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
            )
        )  # fmt: skip
    assert {name: tuple(x.shape) for name, x in next(examples(bart, length=9)).items()} == {
        "input_ids": (2, 9), "labels": (2, 9),
    }  # fmt: skip
    given = next(examples(whisper, batch=3))
    assert tuple(given["input_features"].shape) == (3, 80, 40)
    assert tuple(given["labels"].shape) == (3, 16)
    assert [sorted(each) for each in examples(bart)] == [
        ["input_ids", "labels"], ["decoder_input_ids", "input_ids"], ["input_ids"],
    ]  # fmt: skip
    made = sp.plan(whisper, degree=2)
    assert made.share > 0.9


class OfTwoModes(nn.Module):
    """Training wants targets, as models that detect objects do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("targets are needed in training mode")
        y: Tensor = self.down(self.up(x).relu())
        return y


def test_a_model_that_only_runs_in_evaluation_mode_is_planned_in_it() -> None:
    norm = nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))
    for model in (OfTwoModes().eval(), norm.eval()):
        plan = sp.plan(model, degree=2, inputs=torch.zeros(1, 12))
        assert isinstance(plan, WatchedPlan)
        assert plan.matrix_share == 1
    with pytest.raises(PlanError, match="targets are needed"):
        sp.plan(OfTwoModes(), degree=2, inputs=torch.zeros(1, 12))
