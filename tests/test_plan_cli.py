"""`shardproof plan`: what it prints and writes, and what it refuses."""

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from families import config, small
from shardproof.cli.main import main
from shardproof.plans.planning import plan
from shardproof.scheme import Scheme

pytest.importorskip("transformers", reason="the extra hf is not installed")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str, columns: int = 120) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["plan", *arguments])


@pytest.fixture
def directory(tmp_path: Path) -> str:
    """A Llama's config, and nothing else."""
    made = config("Llama", architectures=["LlamaForCausalLM"], num_hidden_layers=3)
    made.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_one_line_for_every_kind_of_layer(directory: str) -> None:
    result = run(directory, "--degree", "2", "--batch", "2", "--length", "16")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["== LlamaForCausalLM at degree 2", f"{directory}, 8 leaves"]
    table = [re.sub(" {2,}", "|", line.strip()) for line in lines[3:]]
    assert table[0] == "module|cut|leaves|weight|on a rank|step"
    assert "model.embed_tokens|vocabulary|8|101x32|6.5 KiB|forward 1 all_reduce 4.0 KiB" in table
    start = table.index(
        "model.layers.0-2.self_attn|attention, 4 heads, 2 key-value|4|"
        "backward 3 all_reduce 12.0 KiB"
    )
    assert table[start + 1] == "q_proj|column by heads|4|32x32|2.0 KiB"
    assert table[start + 2] == "k_proj|column by heads|2|16x32|1.0 KiB"
    assert lines[3 + start + 1].startswith("   q_proj ")  # below its attention
    assert "lm_head|column, logits stay cut|8|101x32|6.5 KiB|" in "".join(table)
    assert "layers.1" not in result.stdout


def test_what_it_comes_to(directory: str) -> None:
    result = run(directory, "--degree", "2", "--batch", "2", "--length", "16")
    said = result.stdout.splitlines()[-4:]
    assert said == [
        "whole on every rank (small, its input is Replicate): model.layers.0-2.input_layernorm, "
        "model.layers.0-2.post_attention_layernorm, model.norm",
        "parameters: 111.6 KiB, 99.2 % of them cut; a rank holds 53.6 KiB to 58.9 KiB, of which "
        "896 B are on every rank",
        "a training step of 2 x 16 tokens: forward 1 all_gather (3.0 KiB) and 7 all_reduce (28.0 "
        "KiB); backward 7 all_reduce (28.0 KiB); rank 0 sends 57.5 KiB",
        "a generated token of 2 rows: forward 1 all_gather (808 B) and 7 all_reduce (1.8 KiB); "
        "rank 0 sends 2.2 KiB",
    ]


def test_the_page_shows_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "plans.md").read_text()
    command, shown = re.findall(r"^\$ shardproof plan (.*)\n((?:.*\n)*?)```", page, re.MULTILINE)[0]
    sizes = dict(re.findall(r"^    (\w+)=(\d+),$", page, re.MULTILINE))
    made = config("Llama", **{name: int(value) for name, value in sizes.items()})
    made.save_pretrained(tmp_path / "MODEL_DIR")
    monkeypatch.chdir(tmp_path)
    assert run(*command.split(), columns=104).stdout == shown


def test_narrow_screens_lose_columns_and_no_names(directory: str) -> None:
    result = run(directory, "--degree", "3", columns=80)
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[:20])
    assert "weight" not in result.stdout.splitlines()[3]
    assert "model.layers.0-2.self_attn" in result.stdout


def test_ranks_without_heads_are_named(directory: str) -> None:
    result = run(directory, "--degree", "7", columns=200)
    assert "attention, 4 heads, 2 key-value; ranks 4-6 idle" in result.stdout


def test_one_rank_sends_nothing(directory: str) -> None:
    result = run(directory, "--degree", "1")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last == "a training step of 4 x 128 tokens sends nothing: there is one rank"


def test_the_file_has_the_plan_and_what_every_rank_counts(directory: str, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    result = run(directory, "--degree", "3", "--leaves", "6", "--json", str(target))
    assert result.exit_code == 0, result.output
    data = json.loads(target.read_text())
    model = small("Llama", device="meta", num_hidden_layers=3)
    made = plan(model, degree=3, scheme=Scheme(leaves=6))
    assert {**json.loads(json.dumps(made.as_dict())), "directory": directory} == {
        key: value for key, value in data.items() if key != "comm"
    }
    assert data["comm"]["step"] == [made.comm(batch=4, length=128, rank=rank) for rank in range(3)]
    token = made.comm(batch=4, length=1, labels=False)["forward"]
    assert data["comm"]["token"][0] == {"forward": token}


@pytest.mark.parametrize("watch", [(), ("--watch",)])
def test_activations_that_are_cut_along_tokens(
    directory: str, tmp_path: Path, watch: tuple[str, ...]
) -> None:
    """The file has the counts of such a plan, of the tp_plan and of a watched forward."""
    path = tmp_path / "plan.json"
    size = ("--degree", "2", "--batch", "2", "--length", "16")
    result = run(directory, *size, *watch, "--sequence-parallel", "--json", str(path))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["sequence_parallel"] is True
    says = "sequence parallel: activations between blocks are cut along their tokens"
    assert says in result.stdout
    assert says not in run(directory, *size, *watch).stdout
    sent = report["comm"][0] if watch else report["comm"]["step"][0]
    assert sent["forward"]["reduce_scatter"]["calls"] == 6  # of two row layers in three blocks


def test_nothing_is_fetched(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run(directory, "--degree", "2").exit_code == 0


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_directories_that_are_none(tmp_path: Path) -> None:
    assert f"'{tmp_path}/gone' is no directory" in refused(f"{tmp_path}/gone", "--degree", "2")
    (tmp_path / "model.safetensors").touch()
    said = refused(str(tmp_path), "--degree", "2")
    assert f"error: {tmp_path} has no config.json: nothing says which model this is." in said


CONFIGS = {
    "no model type": ("{}", "Should have a `model_type` key"),
    "unknown model": ('{"model_type": "nonsense"}', "model type `nonsense`"),
    "impossible sizes": (
        '{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}',
        "The hidden size (65) is not a multiple of the number of attention heads (4).",
    ),
    "code of its own": (
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}',
        "contains custom code which must be executed",
    ),
}  # fmt: skip


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    said = refused(str(tmp_path), "--degree", "2")
    assert f"error: {tmp_path}/config.json is not JSON (Expecting property name" in said


@pytest.mark.parametrize("what", CONFIGS)
def test_configs_of_no_model(tmp_path: Path, what: str) -> None:
    written, text = CONFIGS[what]
    (tmp_path / "config.json").write_text(written)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    said = refused(str(tmp_path), "--degree", "2")
    assert "error: transformers cannot make a model of " in said
    assert text in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "missing option '--degree'"),
        (("--degree", "two"), "--degree 'two' is not a whole number"),
        (("--degree", "9"), "degree 9 exceeds leaves=8"),
        (("--degree", "2", "--leaves", "0"), "--leaves 0 is not a positive number"),
        (("--degree", "2", "--batch", "-1"), "--batch -1 is not a positive number"),
        (("--degree", "2", "--length", "x"), "--length 'x' is not a whole number"),
        (("--degree", "2", "--json", "gone/plan.json"), "there is no directory"),
    ],
)
def test_options_that_make_no_sense(directory: str, options: tuple[str, ...], text: str) -> None:
    assert text in refused(directory, *options)


def test_without_the_extra(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = refused(directory, "--degree", "2")
    assert "needs the extra 'hf', which is not installed. Run: pip install 'shardproof[hf]'" in said


def test_help_knows_the_options() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("MODEL_DIR", "--degree", "--leaves", "--json"))
