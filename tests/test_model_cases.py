"""The cases `llama` and `qwen`, a user's checkpoint as a case, and what `prove` says of both."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from shardproof.cli import cases as selection
from shardproof.cli import prove as prove_command
from shardproof.cli.main import main
from shardproof.cli.tensor_table import condense
from shardproof.errors import UsageError
from shardproof.hf import load
from shardproof.prover import curve
from shardproof.prover.case import Case
from shardproof.prover.cases import find_case
from shardproof.prover.cases.text_training import TextTraining
from shardproof.prover.cases.transformers_models import (
    LLAMA,
    QWEN,
    SIZES,
    checkpoint_case,
    make_llama,
    make_qwen,
)
from shardproof.prover.proof import prove_cases
from shardproof.prover.report import Report

pytest.importorskip("transformers", reason="needs the extra 'hf'")
pytest.importorskip("safetensors", reason="needs the extra 'hf'")


def short(case: Case, **changes: Any) -> Case:
    """The same case with two steps."""
    assert isinstance(case.work, TextTraining)
    work = dataclasses.replace(case.work, **{"steps": 2} | changes)
    return dataclasses.replace(case, work=work)


def prove(case: Case, degrees: tuple[int, ...], **options: Any) -> Report:
    return prove_cases([case], degrees=degrees, threads=1, **options)


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    told = " ".join(result.stderr.replace("shardproof: error:", "").split())
    assert message in told, told


def command(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, ["prove", *arguments])


# The cases


@pytest.fixture(scope="module", params=[LLAMA, QWEN], ids=["llama", "qwen"])
def proof(request: pytest.FixtureRequest) -> Report:
    return prove(short(request.param), (1, 3))


def test_the_models_are_proved(proof: Report) -> None:
    assert proof.proved, proof.verdict()


def test_logits_loss_and_gradients_agree_in_fp64(proof: Report) -> None:
    tensors = {tensor.name: tensor for tensor in proof.cases[0].tensors}
    weights = [name for name in tensors if name.endswith(".weight (initial)")]
    names = [name.removesuffix(" (initial)") + ".grad" for name in weights]
    assert len(names) >= 21
    for name in ("logits", "loss", *names):
        wide = tensors[f"fp64: {name}"]
        assert wide.dtype == "float64"
        assert wide.torch is not None
        assert (wide.torch.rtol, wide.torch.allclose) == (1e-10, True)


def test_fp32_is_as_near_to_fp64_as_torchs(proof: Report) -> None:
    check = proof.cases[0].checks[-1]
    assert check.name == "no further from fp64 than 1.5 times plain torch's fp32"
    assert check.passed, check.detail


def test_whole_logits_are_those_that_are_cut_for_the_loss(proof: Report) -> None:
    tensors = {tensor.name: tensor for tensor in proof.cases[0].tensors}
    assert tensors["eval: logits"].sha256 == tensors["logits"].sha256


def test_ranks_share_key_value_heads_of_the_cases() -> None:
    assert (SIZES["num_attention_heads"], SIZES["num_key_value_heads"]) == (8, 2)
    assert all(SIZES["vocab_size"] % degree for degree in (2, 3, 4, 8))


def test_qwen_is_tied_and_llama_is_not() -> None:
    llama, qwen = make_llama(0.0), make_qwen(0.0)
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    assert qwen.lm_head.weight is qwen.model.embed_tokens.weight
    assert qwen.model.layers[0].self_attn.q_norm.weight.shape == (12,)


# A checkpoint directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer as `save_pretrained` leaves it."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - an extra

    path = tmp_path_factory.mktemp("models") / "llama"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 1})).save_pretrained(path)
    return path


def copied(directory: Path, tmp_path: Path, *, without: tuple[str, ...] = ()) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns(*without))
    return target


def test_a_checkpoint_in_pieces_is_read_by_its_index(directory: Path, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415 - an extra

    config = Qwen3Config(**SIZES | {"num_hidden_layers": 1}, head_dim=12, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(tmp_path, max_shard_size="80KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    report = prove(short(checkpoint_case(tmp_path), steps=1, dropout=0.0), (2,))
    assert report.proved, report.verdict()


def test_weights_that_a_rank_reads_from_elsewhere(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tensor that differs is the one that was read wrongly."""

    def swapped(model: nn.Module, folder: Path) -> nn.Module:
        load(model, folder)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        return model

    monkeypatch.setattr("shardproof.prover.cases.transformers_models.load", swapped)
    report = prove(short(checkpoint_case(directory), steps=1, dropout=0.0), (1,))
    assert "tensor model.layers.0.mlp.up_proj.weight (initial) is the first" in report.verdict()


# `shardproof prove --model`


def test_the_command_proves_a_directory_and_draws_the_losses(
    directory: Path, tmp_path: Path
) -> None:
    written, drawn = tmp_path / "report.json", tmp_path / "losses.png"
    plot = ("--plot", str(drawn)) if curve.is_installed() else ()
    done = command(
        "--model", str(directory), "--degrees", "1,3", "--steps", "3", "--threads", "1",
        "--json", str(written), *plot,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert not plot or drawn.stat().st_size > 1000
    (case,) = json.loads(written.read_text())["cases"]
    assert len(case["losses"]) == 3
    assert case["losses"][2] < case["losses"][0]
    assert case["curves"]["dropout"]["1"] == case["curves"]["dropout"]["3"]
    assert (case["proved"], case["name"]) == (True, "model")
    assert case["description"].startswith(f"LlamaForCausalLM of {directory} on real text")
    tensors = {tensor["name"]: tensor for tensor in case["tensors"]}
    assert tensors["lm_head.weight (initial)"]["torch"]["exact"], "its own weights"
    assert "dropout: step 1: loss" in tensors
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "gradients 12 tensors no yes" in "\n".join(lines)
    later = sum(not tensor["agreement_judged"] for tensor in case["tensors"])
    assert later > 200
    assert f"recorded after each of 3 steps ({later} tensors): the same at every degree" in lines


def test_the_tensors_of_a_model_are_shown_by_kind() -> None:
    def tensor(name: str, **changes: Any) -> dict[str, Any]:
        plain = {
            "name": name, "identical": True, "agrees": True, "agreement_judged": True,
            "torch": {"exact": False, "max_abs_diff": 1e-7}, "findings": [], "sha256": {},
            "fp64": {"ours": 2e-7, "torch": 3e-7}, "shape": [4],
        }  # fmt: skip
        return plain | changes

    names = [f"layers.{number}.weight" for number in range(30)]
    tensors = [tensor(f"{name} (initial)") for name in names]
    tensors += [tensor("logits"), *(tensor(f"{name}.grad") for name in names)]
    tensors += [*(tensor(name) for name in names), *(tensor(f"{name}.exp_avg") for name in names)]
    tensors += [tensor(f"fp64: {name}.grad") for name in names]
    wrong = tensor("layers.7.weight.grad", identical=False, fp64={"ours": 1.0, "torch": 3e-7})
    tensors[38] = wrong
    rows = condense(tensors)
    assert [(row["name"], row.get("count")) for row in rows] == [
        ("initial weights", 30),
        ("logits", None),
        ("gradients", 30),
        ("layers.7.weight.grad", None),
        ("weights", 30),
        ("optimizer state", 30),
        ("fp64: gradients", 30),
    ]
    assert rows[2]["identical"] is False
    assert rows[2]["fp64"] == {"ours": 1.0, "torch": 3e-7}
    assert rows[4]["torch"] == {"exact": False, "max_abs_diff": 1e-7}
    assert condense(tensors[:60]) == tensors[:60]


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (("config.json",), "has no config.json: nothing says which model this is."),
        (("*.safetensors",), "has no weights: no file ends in .safetensors."),
    ],
)
def test_a_directory_that_lacks_something(
    directory: Path, tmp_path: Path, without: tuple[str, ...], message: str
) -> None:
    path = copied(directory, tmp_path, without=without)
    refused(command("--model", str(path)), f"--model: {path} {message}")


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none"
    refused(command("--model", str(path)), f"--model: '{path}' is no directory.")


def test_pickled_weights_are_never_read(directory: Path, tmp_path: Path) -> None:
    path = copied(directory, tmp_path, without=("*.safetensors",))
    (path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    refused(
        command("--model", str(path)),
        f"--model: {path} has only pickled weights (pytorch_model.bin): a pickle can run any code",
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json is not JSON"),
        ('{"model_type": "no-such-model"}', "transformers cannot make a causal language model of"),
        ('{"model_type": "clip"}', "CLIPConfig is not the config of a causal language model"),
    ],
)
def test_a_config_that_is_of_no_use(
    directory: Path, tmp_path: Path, config: str, message: str
) -> None:
    path = copied(directory, tmp_path)
    (path / "config.json").write_text(config)
    refused(command("--model", str(path)), message)


def test_a_model_that_does_not_know_every_byte(directory: Path, tmp_path: Path) -> None:
    path = copied(directory, tmp_path)
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - an extra

    config = LlamaConfig(**json.loads((path / "config.json").read_text()) | {"vocab_size": 100})
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(path)
    refused(command("--model", str(path)), "one for each byte, and the model knows 100.")


def test_without_transformers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "transformers" else correct(name, *rest),
    )
    way_out = "needs the extra 'hf', which is not installed. Run: pip install 'shardproof[hf]'"
    refused(command("--model", str(directory)), f"--model {directory} {way_out}")
    refused(command("--case", "llama"), f"--case llama {way_out}")
    with pytest.raises(UsageError, match="a checkpoint directory needs the extra 'hf'"):
        checkpoint_case(directory)
    assert {"name": "qwen", "extra": "hf"} in selection.select_cases((), None, None)[1]


def test_weights_of_other_shapes(directory: Path, tmp_path: Path) -> None:
    path = copied(directory, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    refused(command("--model", str(path)), "'model.embed_tokens.weight' has shape (257, ")


# `--steps` and `--plot`


def test_steps_are_for_cases_that_train_on_text(directory: Path) -> None:
    chosen, _ = selection.select_cases(("ffn", "gpt"), str(directory), 3)
    assert [case.name for case in chosen] == ["ffn", "gpt", "model"]
    assert chosen[0] is find_case("ffn")
    assert [case.work.steps for case in chosen[1:]] == [3, 3]
    refused(
        command("--case", "ffn", "--steps", "3"),
        "--steps 3 is for cases that train on text, and there is none among ffn. Add --model DIR, "
        "or one of: --case gpt, --case llama, --case qwen.",
    )
    refused(command("--case", "gpt", "--steps", "0"), "--steps 0 is not a positive number.")


def test_a_plot_of_nothing() -> None:
    if not curve.is_installed():
        pytest.skip("matplotlib is not installed: pip install 'shardproof[plot]'")
    refused(
        command("--case", "ffn", "--plot", "x.png"),
        "--plot x.png: no loss falls over steps in ffn. Add --model DIR, or one of: "
        "--case digits, --case gpt, --case llama, --case qwen.",
    )


def test_a_plot_that_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused(
        command("--case", "gpt", "--plot", "losses.jpeg"),
        "--plot 'losses.jpeg' does not end in .png, .svg and .pdf, which say how to draw. Name a "
        "file, for instance --plot losses.png.",
    )
    monkeypatch.setattr(prove_command.curve, "is_installed", lambda: False)
    refused(
        command("--case", "gpt", "--plot", "x.png"),
        "--plot x.png needs the extra 'plot', which is not installed. "
        "Run: pip install 'shardproof[plot]'",
    )
    monkeypatch.setattr(prove_command.curve, "is_installed", lambda: True)
    nowhere = tmp_path / "none" / "x.png"
    refused(
        command("--case", "gpt", "--plot", str(nowhere)),
        f"--plot {nowhere}: there is no directory {nowhere.parent}.",
    )
