"""`shardproof train` and `generate`: stopped, resumed at another degree, and the same text."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import shardproof as sp
import warm
from shardproof.checkpoint.series import remove_older, run_lock
from shardproof.cli.main import main
from shardproof.training_run import TrainedStep, TrainingOptions, losses_by_degree

transformers = pytest.importorskip("transformers")

LIMIT = 120.0  # seconds that nothing here needs, on a machine however busy
STEPS = 8
SLOW = ("--steps", "20", "--batch", "4", "--length", "32")
OPTIONS = ("--steps", str(STEPS), "--batch", "4", "--length", "24", "--warmup", "2", "--seed", "3")
PROMPT = "def parse(self, arguments):"


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(each) for each in arguments])


def error_of(*arguments: object) -> str:
    """The one line of a command that refuses."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: "), result.stderr
    return lines[-1]


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    made = transformers.LlamaConfig(
        vocab_size=257, hidden_size=24, intermediate_size=50, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        attention_dropout=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made.save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(Path(json.__file__).read_bytes())
    return path


@pytest.fixture(scope="module")
def unbroken(config: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training at degree 1 that was not stopped, with a log and a picture."""
    folder = tmp_path_factory.mktemp("unbroken")
    result = run(
        "train", "--model", config, "--text", text, *OPTIONS, "--save", folder / "run",
        "--every", 3, "--log", folder / "log.jsonl", "--plot", folder / "loss.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_training_saves_logs_and_draws(unbroken: Path) -> None:
    assert [path.name for path in sorted((unbroken / "run").iterdir())] == [
        "step-00000003", "step-00000006", "step-00000008",
    ]  # fmt: skip
    assert sp.latest_checkpoint(unbroken / "run") == unbroken / "run" / "step-00000008"
    log = log_of(unbroken)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(line["degree"] == 1 and line["sent_bytes"] == 0 for line in log)
    assert (unbroken / "loss.png").stat().st_size > 1000


def command_of(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "shardproof", *map(str, arguments)]


def start(*arguments: object) -> warm.Process:
    return warm.Process(command_of(*arguments), env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(condition: Callable[[], object], process: warm.Process) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def slow(config: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with more layers, so that a step takes a while, and its training, not stopped."""
    folder = tmp_path_factory.mktemp("slow")
    values = json.loads(config.read_text()) | {"num_hidden_layers": 6}
    (folder / "config.json").write_text(json.dumps(values))
    model = ("train", "--model", folder / "config.json", "--text", text)
    result = run(*model, *SLOW, "--save", folder / "run")
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("number", "engine"),
    [
        pytest.param(signal.SIGTERM, "processes", id="SIGTERM-processes"),
        pytest.param(signal.SIGINT, "threads", id="SIGINT-threads"),
        pytest.param(signal.SIGTERM, "torchrun", id="SIGTERM-torchrun"),
    ],
)
def test_a_signal_saves_and_another_degree_goes_on(
    number: signal.Signals, engine: str, slow: Path, text: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    saved = ("--save", tmp_path / "run", "--log", log)
    train = ("train", "--model", slow / "config.json", "--text", text, *SLOW, *saved)
    if engine == "torchrun":
        processes = warm.start_ranks(command_of(*train), ranks=2)
    else:
        processes = [start(*train, "--degree", 2, "--engine", engine)]
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, processes[0])
    processes[-1].send_signal(number)  # one rank tells the others
    output = [process.communicate(timeout=LIMIT) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), output
    assert "stopped by a signal" in output[0][0]
    if processes[0] is processes[-1]:
        assert "stopping: this step is finished and saved" in output[0][1]
    stopped_at = len(log.read_text().splitlines())
    latest = sp.latest_checkpoint(tmp_path / "run")
    assert latest is not None, output
    assert latest.name == f"step-{stopped_at:08}"
    assert 3 <= stopped_at < 20, "it was not stopped in the middle"
    resumed = run("train", "--text", text, "--degree", 3, *saved, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "warning" not in resumed.stderr
    last = "step-00000020"
    assert hashes(tmp_path / "run" / last) == hashes(slow / "run" / last)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(
    number: signal.Signals,
    config: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start(
        "train", "--model", config, "--text", text, "--save", tmp_path / "run",
        "--steps", 100_000, "--batch", 64, "--length", 96, "--accumulate", 500,
    )  # fmt: skip
    # The folder of a `StopSignal`, which handles signals before it makes it.
    wait_until(lambda: list(tmp_path.glob("shardproof-stop-*")), process)
    process.send_signal(number)
    while "stopping" not in (line := process.stderr.readline()):
        assert line, process.wait(LIMIT)
    time.sleep(0.6)  # within half a second, two signals are one
    process.send_signal(number)
    process.communicate(timeout=LIMIT)
    assert process.returncode == (143 if number == signal.SIGTERM else 130)
    assert sp.latest_checkpoint(tmp_path / "run") is None


# Layouts ----------------------------------------------------------------------------------------

LAYOUT = ("--steps", "4", "--batch", "5", "--length", "19", "--batch-leaves", "8", "--every", "2")


@pytest.fixture(scope="module")
def on_one_rank(config: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by batch leaves on one rank."""
    folder = tmp_path_factory.mktemp("one")
    result = run("train", "--model", config, "--text", text, *LAYOUT, "--save", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--data-parallel", 2, "--degree", 2, "--sequence-parallel"),
        ("--data-parallel", 3, "--engine", "processes"),
    ],
    ids=["tp 2 x dp 2", "dp 3, processes"],
)
def test_a_layout_changes_no_byte_of_a_checkpoint(
    options: tuple[object, ...], config: Path, text: Path, on_one_rank: Path, tmp_path: Path
) -> None:
    """The first steps in one layout, the others in another, and the files of one rank."""
    result = run(
        "train", "--model", config, "--text", text, *LAYOUT, "--steps", 2, "--schedule", "constant",
        *options, "--save", tmp_path / "run", "--log", tmp_path / "log.jsonl",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "on 4 ranks" in result.stdout or "on 3 ranks" in result.stdout
    line = log_of(tmp_path)[0]
    assert line["sent_bytes"] > 0
    assert line["data_parallel"] == options[1]
    again = run(
        "train", "--model", config, "--text", text, *LAYOUT, "--schedule", "constant",
        "--save", tmp_path / "alone", "--steps", 2,
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    name = "step-00000002"
    assert hashes(tmp_path / "run" / name) == hashes(tmp_path / "alone" / name)


def test_a_training_moves_between_layouts(text: Path, on_one_rank: Path, tmp_path: Path) -> None:
    """From step 2 of one rank on, with more ranks and more passes, to the same weights."""
    shutil.copytree(on_one_rank / "step-00000002", tmp_path / "step-00000002")
    result = run("train", "--text", text, "--save", tmp_path, "--resume", "--data-parallel", 3)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    mine, whole = (hashes(each / "step-00000004") for each in (tmp_path, on_one_rank))
    assert mine == whole


def test_rows_of_a_step_are_divided_without_a_warning(
    text: Path, on_one_rank: Path, tmp_path: Path
) -> None:
    shutil.copytree(on_one_rank / "step-00000002", tmp_path / "step-00000002")
    command = ("train", "--text", text, "--save", tmp_path, "--resume", "--batch", 1)
    result = run(*command, "--accumulate", 5, "--data-parallel", 2)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    mine, whole = (hashes(each / "step-00000004") for each in (tmp_path, on_one_rank))
    of_options = {"shardproof.json", "shardproof.manifest.json"}
    assert {name for name in whole if mine[name] != whole[name]} == of_options


def test_layouts_that_cannot_be_are_refused(config: Path, text: Path) -> None:
    train = ("train", "--model", config, "--text", text)
    assert "--data-parallel 9 has 9 ranks, and a batch has 8 leaves" in error_of(
        *train, "--data-parallel", 9
    )
    assert "and a batch has 2 leaves" in error_of(*train, "--data-parallel", 3, "--batch-leaves", 2)
    assert "--data-parallel" in error_of(*train, "--data-parallel", 0)


@pytest.mark.filterwarnings("ignore:.*was saved under the contract")
def test_a_training_without_batch_leaves_says_so_when_it_is_shared_out(
    unbroken: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(unbroken / "run" / "step-00000006", tmp_path / "step-00000006")
    result = run("train", "--text", text, "--save", tmp_path, "--resume", "--data-parallel", 2)
    assert result.exit_code == 0, result.output
    assert "batch_leaves is 8, and was None" in result.stderr


# Generation -------------------------------------------------------------------------------------


def generate(directory: Path, *more: object) -> str:
    result = run("generate", "--model", directory, "--prompt", PROMPT, "--tokens", 20, *more)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_degree_generates_what_plain_transformers_does(unbroken: Path) -> None:
    directory = unbroken / "run" / "step-00000008"
    texts = {generate(directory, "--degree", degree) for degree in (1, 2, 3)}
    assert len(texts) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([list(PROMPT.encode())])
    plain = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = bytes(token for token in plain[0].tolist() if token < 256)
    assert texts == {expected.decode("utf-8", "replace") + "\n"}


def test_drawn_text_is_the_same_at_every_degree_and_differs_by_seed(unbroken: Path) -> None:
    directory = unbroken / "run" / "step-00000008"
    sampled = ("--temperature", 1.5, "--seed", 7)
    texts = {generate(directory, *sampled, "--degree", degree) for degree in (1, 3)}
    assert len(texts) == 1
    assert texts != {generate(directory, "--temperature", 1.5, "--seed", 8)}


def test_prompts_of_a_file_are_continued_one_by_one(unbroken: Path, tmp_path: Path) -> None:
    directory = unbroken / "run" / "step-00000008"
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text(f"{PROMPT}\n\nimport os  # \u00e9\u4e16\n", encoding="utf-8")
    result = run(
        "generate", "--model", directory, "--prompts", prompts, "--tokens", 20, "--json", report,
        "--degree", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    texts = json.loads(report.read_text())["texts"]
    assert [each["prompt"] for each in texts] == [PROMPT, "import os  # \u00e9\u4e16"]
    assert result.stdout == "\n".join(f"{each['prompt']}{each['text']}\n" for each in texts)
    assert result.stdout.startswith(generate(directory))
    assert result.stderr.splitlines()[-1].startswith("40 tokens in ")


def test_nobody_who_reads_the_text_is_no_fault(unbroken: Path) -> None:
    directory = unbroken / "run" / "step-00000008"
    process = start("generate", "--model", directory, "--prompt", PROMPT, "--tokens", 60)
    process.stdout.close()
    process.wait(LIMIT)
    assert process.returncode == 141, process.stderr.read()
    process.close()


# What is refused --------------------------------------------------------------------------------


def test_a_checkpoint_is_never_written_over_by_a_new_run(
    unbroken: Path, config: Path, text: Path
) -> None:
    before = hashes(unbroken / "run" / "step-00000003")
    message = error_of(
        "train", "--model", config, "--text", text, *OPTIONS, "--save", unbroken / "run"
    )
    assert "has checkpoints (steps 3, 6, 8)" in message
    assert "--resume" in message
    assert hashes(unbroken / "run" / "step-00000003") == before


def test_wrong_arguments_are_refused(
    unbroken: Path, config: Path, text: Path, tmp_path: Path
) -> None:
    train = ("train", "--model", config, "--text", text)
    assert "has no checkpoint" in error_of(*train, "--save", tmp_path / "none", "--resume")
    assert "--resume needs --save" in error_of(*train, "--resume")
    assert "--every 3 needs --save" in error_of(*train, "--every", 3)
    assert "--model is missing" in error_of("train", "--text", text)
    assert "not called config.json" in error_of("train", "--model", text, "--text", text)
    assert "has no weights" in error_of("train", "--model", config.parent, "--text", text)
    above = unbroken / "run"
    assert "is none itself" in error_of("checkpoint", "verify", above)
    assert "has checkpoints" in error_of("generate", "--model", above, "--prompt", "x")
    assert "97 tokens" in error_of(*train, "--length", 97)
    assert "cannot be read" in error_of("train", "--model", config, "--text", tmp_path / "no")
    assert "--lr '0' is not a number above 0" in error_of(*train, "--lr", 0)
    assert "--clip 'nan' is not a number" in error_of(*train, "--clip", "nan")
    assert "--warmup '2.5' is not a whole number" in error_of(*train, "--warmup", "2.5")
    assert "is no directory" in error_of(*train, "--save", text)
    assert "nothing can be saved into" in error_of(*train, "--save", "/proc/here")
    assert "degree 9 exceeds leaves=8" in error_of(*train, "--degree", 9)
    assert "does not end in .png" in error_of(*train, "--plot", tmp_path / "loss.txt")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "has 9 tokens" in error_of("train", "--model", config, "--text", short)
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n')
    assert "has lines already" in error_of(*train, "--log", log)
    assert "has lines already" in error_of(*train, "--log", text)
    assert "--length 1 is too short" in error_of(*train, "--length", 1)
    (tmp_path / "foreign" / "step-00000008").mkdir(parents=True)
    (tmp_path / "foreign" / "step-00000008" / "mine").touch()
    assert "is no checkpoint" in error_of(*train, "--save", tmp_path / "foreign")
    vision = tmp_path / "vision" / "config.json"
    vision.parent.mkdir()
    vision.write_text('{"model_type": "vit"}')
    assert "is no language model" in error_of("train", "--model", vision, "--text", text)
    resume = ("train", "--text", text, "--save", unbroken / "run", "--resume")
    assert "not a log of shardproof train: line 1" in error_of(*resume, "--log", log)
    assert log.read_text() == '{"step": 1}\n'
    for content in ('{"a": 1}', '{"step": "x"}\n', "{}\n"):
        log.write_text(content)
        assert "not a log of shardproof train" in error_of(*resume, "--log", log)
        assert log.read_text() == content


def test_another_model_text_or_option_is_said_on_resume(
    unbroken: Path, slow: Path, config: Path, text: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    source = unbroken / "run" / "step-00000003"
    subprocess.run(["cp", "-r", source.parent, copied], check=True)
    for name in ("step-00000006", "step-00000008"):
        subprocess.run(["rm", "-r", copied / name], check=True)
    other = slow / "config.json"
    message = error_of("train", "--model", other, "--text", text, "--save", copied, "--resume")
    assert "num_hidden_layers is 6 and not 2" in message
    other_text = tmp_path / "other.txt"
    other_text.write_bytes(text.read_bytes() + b"more")
    result = run(
        "train", "--model", config, "--text", other_text, "--save", copied, "--resume",
        "--lr", 0.5, "--steps", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for sentence in ("learning_rate is 0.5, and was 0.003", "steps is 4, and was 8", "the text is"):
        assert sentence in result.stderr
    assert "rows" not in result.stderr, "an option that was not written is the checkpoint's"


def test_two_runs_do_not_share_a_directory(config: Path, text: Path, tmp_path: Path) -> None:
    train = ("train", "--model", config, "--text", text, *OPTIONS, "--save", tmp_path / "run")
    with run_lock(tmp_path / "run"):
        assert "another run saves into" in error_of(*train)
    assert run(*train).exit_code == 0
    assert os.listdir(tmp_path / "run") == ["step-00000008"]


def test_several_files_and_another_number_of_threads(
    config: Path, text: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second.txt"
    second.write_text("more text\n" * 20)
    train = ("train", "--model", config, *OPTIONS, "--save", tmp_path / "run")
    assert run(*train, "--text", text, second, "--steps", 2).exit_code == 0
    resume = ("train", "--save", tmp_path / "run", "--resume", "--steps", 4, "--threads", 2)
    result = run(*resume, "--text", text, "--text", second)
    assert result.exit_code == 0, result.output
    assert "threads is 2, and was 1" in result.stderr
    assert "the text is" not in result.stderr


def test_end_tokens_of_the_model_are_saved(config: Path, text: Path, tmp_path: Path) -> None:
    """They stand in generation_config.json alone."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(config.parent))
    model.generation_config.eos_token_id = [3, 10]
    model.save_pretrained(tmp_path / "model")
    train = ("train", "--model", tmp_path / "model", "--text", text, "--steps", 1, "--length", 24)
    assert run(*train, "--save", tmp_path / "run").exit_code == 0
    saved = json.loads((tmp_path / "run/step-00000001/generation_config.json").read_text())
    assert saved["eos_token_id"] == [3, 10]


def test_a_log_that_cannot_be_written_ends_a_training_that_is_saved(
    config: Path, text: Path, tmp_path: Path
) -> None:
    message = error_of(
        "train", "--model", config, "--text", text, *OPTIONS, "--save", tmp_path / "run",
        "--log", "/dev/full", "--degree", 2,
    )  # fmt: skip
    assert "No space left" in message
    assert sp.latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-00000001"


def test_a_loss_that_is_not_finite_ends_and_keeps_the_checkpoint(
    config: Path, text: Path, tmp_path: Path
) -> None:
    message = error_of(
        "train", "--model", config, "--text", text, *OPTIONS, "--save", tmp_path / "run", "--every",
        1, "--lr", 1e30, "--clip", 0, "--degree", 2, "--steps", 50, "--warmup", 0,
    )  # fmt: skip
    assert "the loss is" in message
    latest = sp.latest_checkpoint(tmp_path / "run")
    assert latest is not None
    assert run("checkpoint", "verify", latest).exit_code == 0


def test_a_log_that_was_cut_off_goes_on(unbroken: Path, text: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", unbroken / "run", tmp_path], check=True)
    subprocess.run(["rm", "-r", tmp_path / "run" / "step-00000008"], check=True)
    log = tmp_path / "log.jsonl"
    whole = (unbroken / "log.jsonl").read_text()
    log.write_text(whole[: len(whole) - 20])
    resume = ("train", "--text", text, "--save", tmp_path / "run", "--resume", "--log", log)
    assert "is no file" not in error_of(*resume, "--text", tmp_path / "missing")
    assert log.read_text() == whole[: len(whole) - 20], "the command failed before its first step"
    assert run(*resume).exit_code == 0
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, STEPS + 1))


def test_a_pipe_that_nobody_reads_any_more_ends_the_training(
    config: Path, text: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = start("train", "--model", config, "--text", text, *OPTIONS[2:], "--steps", 10_000,
                    "--log", pipe)  # fmt: skip
    wait_until(lambda: _read_some(reader), process)
    os.close(reader)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert "pipe cannot be written" in errors


def _read_some(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 100)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize(
    "extra",
    [
        {"num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True},
        {"do_sample": True, "temperature": 0.3, "max_length": 2, "stop_strings": ["a"]},
    ],
)
def test_a_generation_config_chooses_the_special_tokens_alone(
    extra: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    directory = unbroken / "run" / "step-00000008"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(directory / name)
    (tmp_path / "generation_config.json").write_text(json.dumps(extra))
    assert generate(tmp_path, "--degree", 2) == generate(directory)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    command = ("generate", "--model", tmp_path, "--prompt", "x")
    assert "which is no token" in error_of(*command)


def test_generate_refuses_what_it_cannot_do(unbroken: Path, config: Path, tmp_path: Path) -> None:
    directory = unbroken / "run" / "step-00000008"
    command = ("generate", "--model", directory)
    assert "--prompt TEXT or --prompts FILE is missing" in error_of(*command)
    assert "--prompt is empty" in error_of(*command, "--prompt", "")
    (tmp_path / "blank").write_text("\n\n")
    assert "has no line with text" in error_of(*command, "--prompts", tmp_path / "blank")
    assert "more than the 96 positions" in error_of(*command, "--prompt", "x", "--tokens", 96)
    assert "needs --temperature" in error_of(*command, "--prompt", "x", "--top-k", 3)
    assert "has no config.json" in error_of("generate", "--model", tmp_path, "--prompt", "x")
    assert "no weights" in error_of("generate", "--model", config.parent, "--prompt", "x")


# The parts --------------------------------------------------------------------------------------


def test_older_checkpoints_and_leftovers_are_removed(
    config: Path, text: Path, tmp_path: Path
) -> None:
    leftover = tmp_path / "run" / ".step-00000001.saving"
    leftover.mkdir(parents=True)
    (leftover / ".lock").touch()
    (leftover / "model.safetensors").touch()
    (tmp_path / "run" / "step-00000006").mkdir()  # empty, and so replaced
    result = run(
        "train", "--model", config, "--text", text, *OPTIONS, "--save", tmp_path / "run", "--every",
        2, "--keep", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["step-00000006", "step-00000008"]
    (tmp_path / "run" / names[0] / ".lock").touch()  # of a save that was killed after the rename
    remove_older(tmp_path / "run", 2)
    assert not (tmp_path / "run" / names[0] / ".lock").exists()


def test_accumulated_batches_are_one_large_batch_almost(config: Path, text: Path) -> None:
    """The mean over two halves is the mean over all, but for rounding."""
    finals = []
    for rows, accumulate in ((4, 1), (2, 2)):
        result = run(
            "train", "--model", config, "--text", text, "--steps", 3, "--length", 24, "--batch",
            rows, "--accumulate", accumulate,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        finals.append(float(result.stdout.splitlines()[0].split()[-1]))
    assert finals[0] == pytest.approx(finals[1], abs=0.05)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_learning_rate_rises_and_falls(schedule: str) -> None:
    options = TrainingOptions(steps=10, learning_rate=1.0, schedule=schedule, warmup=2)
    rates = [options.learning_rate_at(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    if schedule == "constant":
        assert rates[2:] == [1.0] * 8
    else:
        assert rates[2:] == sorted(rates[2:], reverse=True)
        assert 0 < rates[-1] < 0.2


def test_losses_of_two_degrees_have_gaps() -> None:
    steps = [TrainedStep(n, float(n), 1.0, 1.0, 1.0, 0, 2 if n < 3 else 3) for n in range(1, 5)]
    assert losses_by_degree(steps) == {
        "2": [1.0, 2.0, None, None],
        "3": [None, None, 3.0, 4.0],
    }


def test_batches_follow_from_the_seed_and_the_step(text: Path) -> None:
    batches = sp.TextBatches([text], rows=3, length=5, seed=1)
    assert batches.batch(4).shape == (3, 5)
    assert batches.batch(4).dtype == torch.int64
    assert torch.equal(batches.batch(4), sp.TextBatches([text], rows=3, length=5, seed=1).batch(4))
    others = (batches.batch(5), sp.TextBatches([text], rows=3, length=5, seed=2).batch(4))
    assert all(not torch.equal(batches.batch(4), other) for other in others)
    content = bytes(text.read_bytes())
    assert all(bytes(row.tolist()) in content for row in batches.batch(4))


def test_a_stop_is_seen_by_all_ranks() -> None:
    def work(axis: sp.Axis, stop: sp.StopSignal) -> list[bool]:
        before = stop.is_requested(axis)
        if axis.rank == 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return [before, stop.is_requested(axis)]

    before = signal.getsignal(signal.SIGINT)
    with sp.StopSignal() as stop:
        seen = sp.launch(lambda axis: work(axis, stop), degree=2)
    assert list(seen) == [[False, True]] * 2
    assert signal.getsignal(signal.SIGINT) == before
    with sp.StopSignal() as stop:
        for folder in Path(tempfile.gettempdir()).glob("shardproof-stop-*"):
            if folder == stop._folder:
                folder.rmdir()  # as a cleaner of temporary files does
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.was_requested_here
    with pytest.raises(sp.errors.UsageError, match="main thread"):
        sp.launch(lambda axis: sp.StopSignal().__enter__(), degree=2)


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_the_timeout_arrives_in_the_axes(
    command: str, engine: str, unbroken: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank comes late to the first collective of the command, and the error has the timeout."""
    path = f"shardproof.cli.{command}._work"
    work = importlib.import_module(f"shardproof.cli.{command}")._work

    def late(axis: sp.Axis, **rest: Any) -> Any:
        if axis.rank:
            time.sleep(1.5)
        return work(axis, **rest)

    monkeypatch.setattr(path, late)
    model = unbroken / "run" / "step-00000008"
    start = {"train": ("--text", text, *OPTIONS), "generate": ("--prompt", "x")}[command]
    ranks = ("--degree", 2, "--engine", engine)
    assert "rank 1 of 2 did not come within 0.5 s" in error_of(
        command, "--model", model, *start, *ranks, "--timeout", "0.5"
    )


TIMEOUTS = """
import sys
from shardproof.cli.ranks_here import run_on_ranks
def work(axis):
    halves = axis.split(dp=2, tp=1)
    print(axis.transport.timeout, halves["dp"].transport.timeout)
run_on_ranks(work, None, None, None, float(sys.argv[1]) if sys.argv[1:] else None)
"""


def test_the_timeout_arrives_in_the_axes_under_torchrun() -> None:
    for given, printed in ((["7.5"], "7.5 7.5\n"), ([], "1800.0 1800.0\n")):
        started = warm.start_ranks([sys.executable, "-c", TIMEOUTS, *given], ranks=2)
        outputs = [process.communicate(timeout=LIMIT) for process in started]
        assert [output for output, _ in outputs] == [printed] * 2, outputs


def test_the_example_goes_on_where_it_was(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "train.py"
    command = [sys.executable, str(example), str(tmp_path / "run"), "--degree", "2"]
    process = warm.Process(command, env=dict(os.environ))
    while "step 3" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert warm.run([*command[:-1], "3"], env=dict(os.environ)).returncode == 0
    assert warm.run([*command[:2], str(tmp_path / "whole")], env=dict(os.environ)).returncode == 0
    last = "step-00000024"
    assert hashes(tmp_path / "run" / last) == hashes(tmp_path / "whole" / last)
