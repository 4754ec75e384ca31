"""What is wrong on the command line is one line that names it, with the way out, and exit code 2.

No rank is started here: every error is found before the work.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from invariance import contract_of_one_thread
from shardproof import torchrun
from shardproof.cli import prove as prove_command
from shardproof.cli.main import main
from shardproof.cli.output_file import OutputFile
from shardproof.errors import AxisError, NumericsError, RankError, UsageError
from shardproof.numerics import mode
from shardproof.prover import cases
from shardproof.prover.case import Case
from shardproof.scheme import Scheme
from shardproof.wording import spelt_out


class WorkStartedError(Exception):
    """The work would have begun."""


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may run; and nothing that a torchrun around the tests says may be seen."""

    def refuse(*_: Any, **__: Any) -> None:
        raise WorkStartedError

    monkeypatch.setattr(prove_command, "prove_cases", refuse)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def prove(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, ["prove", *arguments])


def assert_refused(result: Result, message: str) -> None:
    assert result.stderr == f"error: {message}\n"
    assert result.stdout == ""
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--degrees", "1,0"],
            "--degrees 1,0: degree 0 is not a positive number. A degree is a number of ranks; "
            "use 1 or more, for instance --degrees 1,2,3,4.",
        ),
        (
            ["--degrees", "-2"],
            "--degrees -2: degree -2 is not a positive number. A degree is a number of ranks; "
            "use 1 or more, for instance --degrees 1,2,3,4.",
        ),
        (
            ["--degrees", "1,two"],
            "--degrees 1,two: 'two' is not a degree. Use whole numbers, 1 or more, separated by "
            "commas, for instance --degrees 1,2,3,4.",
        ),
        (
            ["--degrees", "1,2.0"],
            "--degrees 1,2.0: '2.0' is not a degree. Use whole numbers, 1 or more, separated by "
            "commas, for instance --degrees 1,2,3,4.",
        ),
        (
            ["--degrees", "1,,2"],
            "--degrees 1,,2: an empty place is not a degree. Use whole numbers, 1 or more, "
            "separated by commas, for instance --degrees 1,2,3,4.",
        ),
        (
            ["--degrees", ""],
            "--degrees is empty, and at least one degree is needed. "
            "Use for instance --degrees 1,2,3,4.",
        ),
        (
            ["--degrees", "2,1,2"],
            "--degrees 2,1,2: degree 2 is there twice. Name each degree once.",
        ),
        (
            ["--degrees", "1,9"],
            "degree 9 exceeds leaves=8: a rank beyond the last leaf would never have work. "
            "Use leaves=9 or more (at every degree, for the leaves fix the bits), or a degree of "
            "at most 8.",
        ),
        (
            ["--leaves", "3"],
            "degree 4 exceeds leaves=3: a rank beyond the last leaf would never have work. "
            "Use leaves=4 or more (at every degree, for the leaves fix the bits), or a degree of "
            "at most 3.",
        ),
        (
            ["--leaves", "0"],
            "--leaves 0 is not a positive number. Use 1 or more, for instance --leaves 8.",
        ),
        (
            ["--threads", "0"],
            "--threads 0 is not a positive number. Use 1 or more, for instance --threads 1.",
        ),
        (
            ["--threads", "many"],
            "--threads 'many' is not a whole number. Use for instance --threads 1.",
        ),
        (
            ["--seed", "tuesday"],
            "--seed 'tuesday' is not a whole number. Use for instance --seed 12345.",
        ),
        (
            ["--seed", "-1"],
            "--seed -1 is out of range. Use a number from 0 to 9223372036854775807, "
            "for instance --seed 12345.",
        ),
        (
            ["--seed", "9" * 5000],
            f"--seed '{'9' * 160}...' (5,000 characters) is not a whole number. "
            "Use for instance --seed 12345.",
        ),
        (
            ["--engine", "process"],
            "--engine 'process' is unknown. Did you mean processes? "
            "Use one of: threads, processes.",
        ),
        (
            ["--numerics", "exact"],
            "--numerics 'exact' is unknown. Use one of: invariant, native.",
        ),
        (["extra"], "got unexpected extra argument (extra) See: shardproof prove --help"),
        (["--seed"], "option '--seed' requires an argument. See: shardproof prove --help"),
    ],
)
def test_a_wrong_option_is_one_clear_line(arguments: list[str], message: str) -> None:
    assert_refused(prove(*arguments), message)


def test_an_unknown_option_names_the_near_ones() -> None:
    result = prove("--degree", "2")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no such option '--degree'.")
    assert "'--degrees'" in result.stderr
    assert result.stderr.endswith("See: shardproof prove --help\n")


def test_an_unknown_case_names_the_near_ones() -> None:
    result = prove("--case", "linear-rows")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: there is no case 'linear-rows'. Near names: linear-row")
    assert "mlp-gathered" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unknown_command_is_named() -> None:
    result = CliRunner().invoke(main, ["proof"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no such command 'proof'.")


def test_no_command_shows_the_help_on_stderr() -> None:
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "prove" in result.stderr
    assert "doctor" in result.stderr


@pytest.fixture
def _without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def rebuild(case: Case) -> Case:
        missing = {"extra": "toy", "module": "no_such_module"} if case.name == "ffn" else {}
        return Case(**(vars(case) | missing))

    everything = tuple(map(rebuild, cases.all_cases()))
    monkeypatch.setattr(cases, "all_cases", lambda: everything)
    monkeypatch.setattr(cases, "find_case", lambda name: {c.name: c for c in everything}[name])


@pytest.mark.usefixtures("_without_extra")
def test_a_case_without_its_extra_is_refused_by_name() -> None:
    assert_refused(
        prove("--case", "matmul-row", "--case", "ffn"),
        "--case ffn needs the extra 'toy', which is not installed. "
        "Run: pip install 'shardproof[toy]'",
    )


@pytest.mark.usefixtures("_without_extra")
def test_a_case_without_its_extra_is_skipped_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def remember(asked: tuple[Case, ...], **options: Any) -> None:
        seen.update(options, names=[case.name for case in asked])
        raise NumericsError("enough")

    monkeypatch.setattr(prove_command, "prove_cases", remember)
    assert prove().exit_code == 2
    assert "ffn" not in seen["names"]
    assert "matmul-row" in seen["names"]
    assert {"name": "ffn", "extra": "toy"} in seen["skipped"]


@pytest.mark.usefixtures("_without_extra")
def test_the_list_says_which_extra_is_missing() -> None:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["prove", "--list"])
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if line.startswith("ffn "))
    assert line.endswith("toy, not installed")


def no_directory(path: Path) -> tuple[str, str]:
    file = path / "missing" / "report.json"
    return str(file), (
        f"--json {file}: there is no directory {file.parent}. "
        f"Create it first, or name a file elsewhere."
    )


def a_directory(path: Path) -> tuple[str, str]:
    return str(path), (
        f"--json {path} is a directory. Name a file, for instance --json {path}/report.json."
    )


def below_a_file(path: Path) -> tuple[str, str]:
    (path / "file").touch()
    file = path / "file" / "report.json"
    return str(file), (
        f"--json {file}: there is no directory {file.parent}. "
        f"Create it first, or name a file elsewhere."
    )


def too_long(path: Path) -> tuple[str, str]:
    file = path / ("x" * 300)
    return str(file), (
        f"--json {file} cannot be written: File name too long. "
        f"Name a file in a directory where you may create files."
    )


def no_name(path: Path) -> tuple[str, str]:
    return "", "--json is empty. Name a file, for instance --json report.json."


@pytest.mark.parametrize("place", [no_directory, a_directory, below_a_file, too_long, no_name])
def test_a_report_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, place: Callable[[Path], tuple[str, str]]
) -> None:
    written, message = place(tmp_path)
    assert_refused(prove("--json", written), message)


def test_a_directory_without_permission_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "report.json"  # root may write anywhere, so the refusal is played
    monkeypatch.setattr(Path, "open", deny)
    assert_refused(
        prove("--json", str(file)),
        f"--json {file} cannot be written: Permission denied. "
        f"Name a file in a directory where you may create files.",
    )


def test_a_write_protected_report_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.json"
    file.write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, wanted: False)
    assert_refused(
        prove("--json", str(file)),
        f"--json {file} cannot be written: the file is write-protected. "
        f"Make it writable, or name another file.",
    )
    assert file.read_text() == "kept"


def test_a_run_that_fails_leaves_the_earlier_report(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("kept")
    result = prove("--json", str(file))
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 70
    assert "WorkStartedError" in result.stderr
    assert file.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_document_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("kept")
    file.chmod(0o640)
    target = OutputFile(str(file))
    with pytest.raises(TypeError, match="not JSON serializable"):
        target.write({"bad": object()})
    assert file.read_text() == "kept"
    target.write({"good": 1})
    assert json.loads(file.read_text()) == {"good": 1}
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").touch()
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    OutputFile(str(link)).write({"good": 1})
    assert link.is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"good": 1}


def test_a_device_is_written_and_never_replaced() -> None:
    before = os.stat(os.devnull)
    OutputFile(os.devnull).write({"good": 1})
    assert os.stat(os.devnull).st_ino == before.st_ino


def test_a_place_that_vanished_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    target = OutputFile(str(folder / "report.json"))
    folder.rmdir()
    with pytest.raises(UsageError, match=r"report\.json could not be written: No such file"):
        target.write({})


def test_numbers_that_json_lacks_are_spelt_out() -> None:
    assert spelt_out({"a": [float("inf"), float("nan"), 1.0], 2: (True, None)}) == {
        "a": ["inf", "nan", 1.0],
        "2": [True, None],
    }


def earlier(**changes: Any) -> str:
    report = {
        "proved": True,
        "numerics": "invariant",
        "leaves": 8,
        "seed": 12345,
        "contract": contract_of_one_thread(),
        "cases": [{"name": "ffn", "tensors": [{"name": "output", "sha256": {"1": "aa" * 32}}]}],
    }
    return json.dumps(report | changes)


WAY_OUT = "Name a file that `shardproof prove --json FILE` wrote."


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "{} cannot be read: No such file or directory. " + WAY_OUT),
        ("{", "{} is not JSON (Expecting property name enclosed in double quotes, line 1, "
         "column 2). " + WAY_OUT),
        ("[]", "{} is not a report: it holds a list, not an object. " + WAY_OUT),
        ("{\"proved\": true}", "{} is not a report: it has no 'leaves' and no 'contract' and no "
         "'cases'. " + WAY_OUT),
        (earlier(cases=5), "{} is not a report: 'cases' is not a list of cases with names and "
         "tensors. " + WAY_OUT),
        (earlier(cases=[{"name": "ffn", "tensors": [{"name": "output"}]}]),
         "{} is not a report: a tensor of case 'ffn' has no hashes. " + WAY_OUT),
        (earlier(cases=[{"name": "ffn", "tensors": [{"sha256": {}}]}]),
         "{} is not a report: a case or a tensor has no name. " + WAY_OUT),
        (earlier(seed=1), "{}: the earlier report cannot be compared: its seed is 1, this one's is "
         "12345, and the bits depend on it. Run both with the same seed."),
    ],
)  # fmt: skip
def test_an_earlier_report_that_cannot_serve_is_refused(
    tmp_path: Path, text: str | None, fault: str
) -> None:
    file = tmp_path / "earlier.json"
    if text is not None:
        file.write_text(text)
    result = prove("--case", "ffn", "--threads", "1", "--against", str(file))
    assert_refused(result, f"--against {fault.replace('{}', str(file), 1)}")


def test_an_earlier_report_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    file.write_bytes(b"\xff\xfe\x00")
    message = f"--against {file} is not JSON: it is not text. {WAY_OUT}"
    assert_refused(prove("--against", str(file)), message)


def test_an_earlier_report_with_other_cases_is_refused_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(earlier())
    result = prove("--case", "matmul-row", "--threads", "1", "--against", str(file))
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: --against {file}: the earlier report has nothing in common with this one: it has "
        f"the cases ffn, this one has matmul-row. Run a case that both have.\n"
    )


def test_an_earlier_report_of_another_contract_is_refused_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(earlier(contract="tree-3 leaves=4"))
    result = prove("--case", "ffn", "--against", str(file))
    assert result.exit_code == 2
    assert "its contract is 'tree-3 leaves=4'" in result.stderr


def test_native_reports_need_a_degree_in_common(tmp_path: Path) -> None:
    native = Scheme(numerics="native")
    file = tmp_path / "earlier.json"
    file.write_text(earlier(numerics="native", contract=mode.contract(native)))
    arguments = ["--case", "ffn", "--numerics", "native", "--against", str(file)]
    result = prove(*arguments, "--degrees", "2,3")
    assert result.exit_code == 2
    assert "at a degree that both have" in result.stderr
    assert prove(*arguments, "--degrees", "1").exit_code == 70  # the work would have begun


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "0"},
            "the environment has RANK=0 but no WORLD_SIZE, and torchrun sets both. "
            "Start with torchrun, or unset RANK to run without it.",
        ),
        (
            {"WORLD_SIZE": "2"},
            "the environment has WORLD_SIZE=2 but no RANK, and torchrun sets both. "
            "Start with torchrun, or unset WORLD_SIZE to run without it.",
        ),
        (
            {"RANK": "x", "WORLD_SIZE": "2"},
            "the environment has RANK='x', which is not a whole number. "
            "Start with torchrun, or unset both to run without it.",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "the environment has RANK=2 and WORLD_SIZE=2, and a rank is at least 0 and below the "
            "world size. Start with torchrun, or unset both to run without it.",
        ),
    ],
)
def test_a_broken_torchrun_environment_is_refused(
    environment: dict[str, str], message: str
) -> None:
    assert_refused(prove(**environment), message)


@pytest.mark.parametrize("option", ["--engine", "--degrees"])
def test_torchrun_decides_engine_and_degree(option: str) -> None:
    value = {"--engine": "threads", "--degrees": "1,2"}[option]
    message = (
        f"{option} {value} cannot be given under torchrun, which has started 2 ranks "
        f"(WORLD_SIZE=2): the degree is their number. Leave {option} out, or run without torchrun."
    )
    assert_refused(prove(option, value, RANK="0", WORLD_SIZE="2"), message)
    silent = prove(option, value, RANK="1", WORLD_SIZE="2")
    assert (silent.exit_code, silent.stderr) == (2, "")  # rank 0 has said it


def test_more_ranks_than_leaves_is_refused_under_torchrun() -> None:
    result = prove(RANK="0", WORLD_SIZE="16")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: degree 16 exceeds leaves=8")
    silent = prove(RANK="15", WORLD_SIZE="16")
    assert (silent.exit_code, silent.stderr) == (2, "")


def test_torchrun_environment_is_read() -> None:
    assert torchrun.read({}) is None
    assert torchrun.read({"RANK": "1", "WORLD_SIZE": "3"}) == torchrun.TorchrunRank(1, 3)
    with pytest.raises(AxisError, match="RANK=-1"):
        torchrun.read({"RANK": "-1", "WORLD_SIZE": "3"})


def test_numerics_that_cannot_run_are_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = "SHARDPROOF_BLAS=off leaves the BLAS library in its default mode."
    state = mode.BlasState("off", "off", problem=problem)
    monkeypatch.setattr(mode, "set_blas_mode", lambda: state)
    assert_refused(prove("--case", "ffn"), problem)


def test_an_error_raised_on_purpose_in_the_work_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NumericsError("SGD(fused=True) gives other bits.")

    monkeypatch.setattr(prove_command, "prove_cases", fail)
    result = prove("--case", "ffn")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: SGD(fused=True) gives other bits."
    assert "Traceback" not in result.stderr


def test_a_fault_of_ours_keeps_its_traceback_and_is_no_answer() -> None:
    result = prove("--case", "ffn")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "WorkStartedError" in result.stderr


@pytest.mark.parametrize(("cause", "code"), [(IndexError("x"), 70), (None, 2)])
def test_a_fault_on_a_rank_is_no_answer_and_a_killed_rank_is_an_error(
    monkeypatch: pytest.MonkeyPatch, cause: Exception | None, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RankError("rank 1 of 2 failed\n\nits traceback", rank=1) from cause

    monkeypatch.setattr(prove_command, "prove_cases", fail)
    result = prove("--case", "ffn")
    assert result.exit_code == code
    assert result.stderr == "error: rank 1 of 2 failed\n\nits traceback\n"


def test_an_interrupt_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prove_command, "prove_cases", interrupt)
    result = prove("--case", "ffn")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
