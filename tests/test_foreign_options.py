"""Options, variables of the environment, places for reports and standard output, of every command.

Each that cannot be is one error, exit code 2, before any work; none is a traceback or a wait.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import warm
from foreign import LONGEST, in_time, outcomes
from shardproof import c_modules, environment
from shardproof.axis import Axis
from shardproof.checked_values import read_whole, real_number, whole_number
from shardproof.cli import prove as prove_command
from shardproof.cli.main import (
    LONGEST_MESSAGE,
    OutputError,
    ReaderLeftError,
    _Output,
    main,
    prepare_streams,
)
from shardproof.cli.output import PlainConsole, ProgressLines
from shardproof.cli.output_file import OutputFile
from shardproof.errors import AxisError, UsageError
from shardproof.numerics import mode
from shardproof.wording import few, short_repr, short_text

COMMANDS = {
    "prove": ["prove", "--case", "ffn"],
    "list": ["prove", "--list"],
    "doctor": ["doctor"],
}


class WorkStartedError(Exception):
    """The option was taken."""


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise WorkStartedError

    monkeypatch.setattr(prove_command, "prove_cases", refuse)


def shardproof(*arguments: str, **variables: str) -> Result:
    with in_time():
        return CliRunner(env=variables).invoke(main, list(arguments))


def fault(result: Result, says: str) -> str | None:
    """What is wrong with a result that is to be one clear error; None if nothing is."""
    if result.exit_code != 2 or not result.stderr.startswith("error: "):
        return f"exit code {result.exit_code}: {result.output[-200:]}"
    if not re.search(says, result.stderr):
        return f"says {result.stderr[:300]}"
    return f"says {len(result.stderr)} characters" if len(result.stderr) > LONGEST else None


NO_NUMBERS = [
    "", " ", "1 2", "1e3", "1.5", "nan", "inf", "0x10", "1_000", "True", "1,", "\u0663", "\uff11",
    "\u00b2", "\udcff", "9" * 5000, "x" * 10**6,
]  # fmt: skip
NOT_POSITIVE = ["0", "-1", "-0", "-" + "9" * 900]
TOO_LARGE = ["9" * 30, "18446744073709551616"]


@pytest.mark.parametrize("option", ["--leaves", "--steps", "--threads", "--seed"])
def test_a_number_that_is_none_is_refused_by_the_name_of_its_option(option: str) -> None:
    start = COMMANDS["prove"]
    wrong = {
        text[:20]: fault(shardproof(*start, option, text), f"{option} '.*is not a whole number")
        for text in NO_NUMBERS
    }
    says = f"{option} .*(is not a positive number|is out of range)"
    texts = TOO_LARGE if option == "--seed" else NOT_POSITIVE + TOO_LARGE
    wrong |= {text[:20]: fault(shardproof(*start, option, text), says) for text in texts}
    assert {text: why for text, why in wrong.items() if why} == {}


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_timeout_that_nobody_waits_is_refused_by_the_command(command: str) -> None:
    needed = {"train": ("--text", "x"), "generate": ("--model", "x")}[command]
    says = dict.fromkeys(("", "0", "-1", "nan", "inf", "1 h"), "is not a number above 0")
    says |= dict.fromkeys(("31536001", "1e300"), "is longer than a year. Use at most 31536000")
    wrong = {
        text: fault(shardproof(command, *needed, "--timeout", text), f"--timeout '{text}' {why}")
        for text, why in says.items()
    }
    assert {text: why for text, why in wrong.items() if why} == {}


def test_degrees_that_are_none_are_refused() -> None:
    texts = [*NO_NUMBERS, *NOT_POSITIVE, "1,2,", "1;2", "1-3", "1,1", "1,2" * 2000, "1," * 10**5]
    wrong = {
        text[:20]: fault(shardproof(*COMMANDS["prove"], "--degrees", text), "degree")
        for text in texts
    }
    assert {text: why for text, why in wrong.items() if why} == {}


@pytest.mark.parametrize("option", ["--transport", "--numerics", "--case"])
def test_a_name_that_is_none_is_refused_and_shortened(option: str) -> None:
    wrong = {
        text[:20]: fault(shardproof("prove", option, text), "unknown|there is no")
        for text in ("", "x" * 10**6, "AUTO", "\udcff", "a\nb", "\x1b[31m")
    }
    assert {text: why for text, why in wrong.items() if why} == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_for_a_report_that_is_none_is_refused(command: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    places = {
        str(tmp_path): "is a directory",
        str(tmp_path / "loop"): "cannot be written",
        str(tmp_path / "pipe"): "is a named pipe that nobody reads",
        f"{__file__}/x": "there is no directory",
        "x" * 5000: "File name too long",
        "/".join(["x" * 200] * 30): "cannot be written|there is no directory",
        "a\0b": "zero byte",
        "": "is empty",
        "\ud800": "no path has such a character",
    }
    wrong = {
        place[-20:]: fault(shardproof(*COMMANDS[command], "--json", place), f"--json.*{says}")
        for place, says in places.items()
    }
    assert {place: why for place, why in wrong.items() if why} == {}


def test_a_disk_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardproof.cli.output_file.stat.S_ISBLK", lambda kind: True)
    with pytest.raises(UsageError, match="is a disk, of which a report would overwrite the start"):
        OutputFile(os.devnull)


def test_a_plot_goes_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dir.png").mkdir()
    places = [*(str(each) for each in tmp_path.iterdir()), "x" * 5000 + ".png", "\ud800.png", "a"]
    wrong = {
        place[-20:]: fault(shardproof("prove", "--case", "digits", "--plot", place), "--plot")
        for place in places
    }
    assert {place: why for place, why in wrong.items() if why} == {}


def test_a_pipe_with_a_reader_gets_the_report(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    with in_time():
        while True:
            try:
                target = OutputFile(str(tmp_path / "pipe"))
                break
            except UsageError:  # the reader has not come yet
                continue
        target.write({"good": 1})
    reader.join(10)
    assert got == ['{\n "good": 1\n}\n']


BAD_NUMBERS = ["x", "1.0", "", "nan", "\u0663", "\uff11", "1_0", "9" * 5000, "x" * 10**5, "\udcff"]
FULL = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
}  # fmt: skip


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_of_torchrun_that_is_no_number_is_refused_by_the_command(name: str) -> None:
    both = {"RANK": "0", "WORLD_SIZE": "2"}
    wrong = {
        text[:20]: fault(shardproof("prove", **(both | {name: text})), f"{name}=|exceeds leaves=8")
        for text in (*BAD_NUMBERS, "-1", "9" * 30)
    }
    assert {text: why for text, why in wrong.items() if why} == {}


@pytest.mark.parametrize("name", [name for name in FULL if name != "MASTER_ADDR"])
def test_a_variable_of_torchrun_that_is_no_number_is_refused_by_the_axis(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardproof.axis._meet", lambda *_: 1 / 0)  # nobody may be waited for
    for each, value in FULL.items():
        monkeypatch.setenv(each, value)
    wrong = {}
    for text in (*BAD_NUMBERS, "-1", "9" * 30):
        monkeypatch.setenv(name, text)
        wrong |= outcomes({text[:20]: (Axis.from_env, name)})
    assert wrong == {}


def test_an_empty_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for each, value in (FULL | {"MASTER_ADDR": " "}).items():
        monkeypatch.setenv(each, value)
    with pytest.raises(AxisError, match="an empty MASTER_ADDR"):
        Axis.from_env()


@pytest.mark.parametrize("text", ["x" * 10**6, "1", "of", "\udcff", "auto,off"])
def test_a_setting_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = str(mode._set(text).problem)
    assert re.search(r"SHARDPROOF_BLAS=.* is unknown. Use one of: auto, avx512", problem)
    assert len(problem) < LONGEST
    assert len(mode._set(text).setting) < LONGEST
    monkeypatch.setitem(os.environ, "SHARDPROOF_CORE", text)
    with pytest.raises(UsageError, match=r"SHARDPROOF_CORE=.* Use one of: auto, off"):
        c_modules._load.__wrapped__("_kernels")


@pytest.mark.parametrize("text", ["off", "OFF", " off "])
def test_settings_do_not_mind_letters_and_blanks(text: str) -> None:
    assert environment.setting({"A": text}, "A", ("auto", "off")) == "off"
    assert environment.setting({"A": " "}, "A", ("auto", "off")) == "auto"
    assert environment.setting({}, "A", ("auto", "off")) == "auto"


def test_numbers_in_any_spelling() -> None:
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    assert [read_whole(text) for text in (" 7 ", "+7", "-7", "7\n")] == [7, 7, -7, 7]
    assert [whole_number(each) for each in (7, np.int64(7), torch.tensor(7))] == [7, 7, 7]
    for each in (True, np.bool_(True), torch.tensor(True), 7.0, "7", None, torch.ones(2)):
        assert whole_number(each) is None
    assert [real_number(each) for each in (7, 0.5, np.float32(0.5))] == [7.0, 0.5, 0.5]
    assert [real_number(each) for each in (10**400, -(10**400))] == [float("inf"), -float("inf")]
    for each in (True, "1", None, 1j):
        assert real_number(each) is None


def test_a_value_in_a_message_is_short_and_on_one_line() -> None:
    assert short_repr({"a": [1, (2,)], "b": {3}}) == "{'a': [1, (2,)], 'b': {3}}"
    assert (
        short_repr([set(), frozenset(), frozenset({1}), ()])
        == "[set(), frozenset(), frozenset({1}), ()]"
    )
    assert short_repr("a\nb") == "'a\\nb'"
    assert short_repr(10**5000) == "a whole number of 16,610 bits"
    assert len(short_repr(list(range(10**6)))) < 100
    assert len(short_repr("x" * 10**7)) <= 200
    assert short_text("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert few([]) == ""


def test_a_long_text_of_an_error_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UsageError("start " + "x" * 50_000_000 + " end")

    monkeypatch.setattr(prove_command, "prove_cases", fail)
    result = shardproof(*COMMANDS["prove"])
    assert result.exit_code == 2
    assert "error: start xxx" in result.stderr
    assert "characters left out" in result.stderr
    assert result.stderr.endswith("xxx end\n")
    assert len(result.stderr) < LONGEST_MESSAGE + 500


def test_an_error_that_nobody_can_be_told_is_still_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shardproof.cli.main.click.echo", full)
    assert shardproof("prove", "--degrees", "0").exit_code == 2
    monkeypatch.setattr("shardproof.cli.main.traceback.print_exc", full)
    assert shardproof(*COMMANDS["prove"]).exit_code == 70


def test_standard_output_that_fails_says_that_it_was_standard_output() -> None:
    out = _Output(io.FileIO("/dev/full", "w"), encoding="utf-8", write_through=True)
    with pytest.raises(OutputError, match="standard output cannot be written: No space left"):
        out.write("answer")
    out.close()
    buffered = _Output(io.BufferedWriter(io.FileIO("/dev/full", "w")), encoding="utf-8")
    buffered.write("answer")
    with pytest.raises(OutputError, match="standard output cannot be written: No space left"):
        buffered.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), buffered.fileno())  # or what is left would fail again
    buffered.close()


def test_a_reader_that_has_left_is_told_apart_from_a_full_disk() -> None:
    read, write = os.pipe()
    os.close(read)
    out = _Output(io.FileIO(write, "w"), encoding="utf-8", write_through=True)
    with pytest.raises(ReaderLeftError):
        out.write("answer")
    out.close()


def test_streams_that_are_closed_are_noticed_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(OutputError, match="standard output is closed, and the answer goes there"):
        prepare_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.write("goes nowhere")
        stream.close()


def test_progress_that_nobody_can_see_does_not_stop_the_work() -> None:
    class Full(PlainConsole):
        def print(self, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

    ProgressLines(Full())(1, 2, "ffn, plain torch")


# Each of these is a process of its own: what the streams of a process are cannot be played whole.
# Where nothing is buffered, a reader that has left is noticed in the middle of a text.
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}
STREAMS: list[tuple[str, dict[str, str], int, str]] = [
    ("doctor >&-", UNBUFFERED, 2, "error: standard output is closed"),
    ("--help | true", UNBUFFERED, 141, ""),
]


def ended(out: int, *words: str) -> tuple[int, str]:
    """Exit code and errors of a command whose standard output is `out`."""
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as errors:
        streams = (nothing.fileno(), out, errors.fileno())
        process = warm.Process([sys.executable, "-m", "shardproof", *words], streams=streams)
        code = process.wait(120)
        errors.seek(0)
        return code, errors.read().decode()


def test_standard_output_that_is_closed_full_or_unread_is_no_answer() -> None:
    started = []
    for arguments, variables, _, _ in STREAMS:
        shell = f"set -o pipefail; {sys.executable} -m shardproof {arguments}"
        started.append(
            subprocess.Popen(
                ["bash", "-c", shell],
                env=os.environ | variables,
                stdout=-1,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for (arguments, _, code, says), process in zip(STREAMS, started, strict=True):
        _, stderr = process.communicate(timeout=120)
        assert (arguments, process.returncode) == (arguments, code), stderr[-400:]
        assert stderr.startswith(says)
        assert says or not stderr
        assert "Traceback" not in stderr
    with open("/dev/full", "w") as full:
        code, stderr = ended(full.fileno(), "prove", "--list")
    assert code == 2
    assert stderr.startswith("error: standard output cannot be written: No sp")
    assert "Traceback" not in stderr
    read, write = os.pipe()
    os.close(read)
    assert ended(write, "doctor") == (141, "")
    os.close(write)


@pytest.mark.parametrize("columns", ["0", "5"])
def test_a_terminal_without_room_gets_the_text(columns: str) -> None:
    done = shardproof("doctor", COLUMNS=columns)
    assert done.exit_code == 0
    assert "numerics" in done.stdout


def test_an_interface_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the work runs here
    case = ("--case", "matmul-row", "--degrees", "2", "--transport", "gloo")
    done = CliRunner(env={"GLOO_SOCKET_IFNAME": "bogus0"}).invoke(main, ["prove", *case])
    assert done.exit_code == 2
    assert "the ranks cannot meet over gloo" in done.stderr
    assert "GLOO_SOCKET_IFNAME is 'bogus0', and must be the name of a" in done.stderr
    assert "Traceback" not in done.stderr
