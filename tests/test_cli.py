"""`shardproof prove` for real: small cases on threads, on processes and under torchrun."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import warm
from invariance import contract_of_one_thread
from places import CARRIER
from shardproof import __version__
from shardproof.cli import output
from shardproof.cli import prove as prove_command
from shardproof.cli.main import main
from shardproof.cli.output import PlainConsole
from shardproof.numerics import mode
from shardproof.prover.cases import all_cases
from shardproof.scheme import Scheme

SMALL = ("--case", "matmul-row", "--case", "ffn", "--degrees", "1,2")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def prove(*arguments: str, columns: int = 80) -> Result:
    runner = CliRunner(env={"COLUMNS": str(columns)})
    return runner.invoke(main, ["prove", *arguments])


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any], Path]:
    """One run of two small cases, and the report that it wrote."""
    path = tmp_path_factory.mktemp("proof") / "report.json"
    result = prove(*SMALL, "--threads", "1", "--json", str(path))
    return result, json.loads(path.read_text()), path


Proof = tuple[Result, dict[str, Any], Path]


def test_a_proof_exits_with_0_and_says_so_last(proof: Proof) -> None:
    result, report, _ = proof
    assert result.exit_code == 0, result.output
    assert report["proved"] is True
    assert report["engine"] == "threads"
    assert report["contract"] == contract_of_one_thread()
    last = result.stdout.splitlines()[-1]
    assert last.startswith("Proved for 2 cases with ")
    assert "the same bits at degrees 1 and 2" in last
    assert last.endswith("Ranks: threads.")


def test_the_report_has_every_case_and_degree(proof: Proof) -> None:
    _, report, _ = proof
    assert [case["name"] for case in report["cases"]] == ["matmul-row", "ffn"]
    for case in report["cases"]:
        assert case["degrees"] == [1, 2]
        assert all(set(tensor["sha256"]) == {"1", "2"} for tensor in case["tensors"])


def test_the_screen_has_what_the_report_has(proof: Proof) -> None:
    result, report, _ = proof
    lines = [line.split() for line in result.stdout.splitlines()]
    for case in report["cases"]:
        assert ["==", case["name"]] in lines
        for tensor in case["tensors"]:
            short = tensor["sha256"]["1"][:8]
            assert any(line[-2:] == [short, "yes"] for line in lines), tensor["name"]


def test_the_screen_is_plain_text_of_80_columns_in_a_pipe(proof: Proof) -> None:
    result, _, _ = proof
    assert result.stdout.isascii()
    assert "\x1b" not in result.output
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80


def test_progress_is_short_lines_on_stderr_in_a_pipe(proof: Proof) -> None:
    result, _, _ = proof
    assert result.stderr.splitlines()[0] == "[0/6] matmul-row, plain torch"
    assert "[5/6] ffn, degree 2" in result.stderr.splitlines()


def test_progress_in_a_terminal_moves_in_ascii_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    made = PlainConsole(file=terminal, force_terminal=True, width=80, legacy_windows=False)
    monkeypatch.setattr(output, "console", lambda stderr: made)
    with output.progress(is_speaker=True) as tell:
        assert tell is not None
        tell(3, 6, "ffn, degree [2]")
    text = terminal.getvalue()
    assert "[############............] 3/6  ffn, degree [2]" in text
    assert text.isascii()
    assert text.endswith("\x1b[2K")  # the line is wiped


def test_other_ranks_show_no_progress(capfd: pytest.CaptureFixture[str]) -> None:
    with output.progress(is_speaker=False) as tell:
        assert tell is None
    assert capfd.readouterr() == ("", "")


def test_another_degree_has_the_same_hashes(proof: Proof, tmp_path: Path) -> None:
    _, _, path = proof
    out = tmp_path / "second.json"
    result = prove("--case", "ffn", "--degrees", "3", "--against", str(path), "--json", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["against"]["same"] is True
    assert report["against"]["compared"] == len(report["cases"][0]["tensors"])
    assert f"tensors have the same bits as in {path}." in result.stdout


def test_a_difference_from_an_earlier_report_is_exit_1_and_named(
    proof: Proof, tmp_path: Path
) -> None:
    _, report, _ = proof
    changed = json.loads(json.dumps(report))
    (victim,) = (t for t in changed["cases"][1]["tensors"] if t["name"] == "up.weight.grad")
    victim["sha256"] = dict.fromkeys(victim["sha256"], "0" * 64)
    path, out = tmp_path / "changed.json", tmp_path / "out.json"
    path.write_text(json.dumps(changed))

    result = prove(*SMALL, "--against", str(path), "--json", str(out))

    assert result.exit_code == 1
    written = json.loads(out.read_text())
    assert written["proved"] is True
    assert written["against"]["differences"] == [
        {"case": "ffn", "tensor": "up.weight.grad", "what": "other bits"}
    ]
    compared = written["against"]["compared"]
    assert result.stdout.splitlines()[-1] == (
        f"Not proved: in case ffn, tensor up.weight.grad is the first that has other bits than in "
        f"{path} (1 of {compared} differ)."
    )


@pytest.mark.parametrize(
    ("renamed", "differences", "said"),
    [
        ("up.weight.grad", ["not in the earlier report", "only in the earlier report"],
         "tensor up.weight.grad is the first that is missing from {} (2 of {} differ)."),
        (None, ["only in the earlier report"],
         "tensor gone is the first that was not recorded, but is in {} (1 of {} differ)."),
    ],
)  # fmt: skip
def test_a_tensor_that_one_report_lacks_is_exit_1_and_named(
    proof: Proof, tmp_path: Path, renamed: str | None, differences: list[str], said: str
) -> None:
    _, report, _ = proof
    changed = json.loads(json.dumps(report))
    tensors = changed["cases"][1]["tensors"]
    if renamed is None:
        tensors.append(tensors[-1] | {"name": "gone"})
    for tensor in tensors:
        tensor["name"] = "gone" if tensor["name"] == renamed else tensor["name"]
    path, out = tmp_path / "changed.json", tmp_path / "out.json"
    path.write_text(json.dumps(changed))

    result = prove(*SMALL, "--against", str(path), "--json", str(out))

    assert result.exit_code == 1
    found = json.loads(out.read_text())["against"]
    assert [difference["what"] for difference in found["differences"]] == differences
    last = result.stdout.splitlines()[-1]
    assert last == f"Not proved: in case ffn, {said.format(path, found['compared'])}"


def test_another_contract_after_the_work_still_leaves_the_report(
    proof: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, report, _ = proof
    path, out = tmp_path / "changed.json", tmp_path / "out.json"
    path.write_text(json.dumps(report | {"contract": "tree-3 leafwise threads=7"}))
    # As if the ranks came to run under another contract than was foreseen.
    monkeypatch.setattr(prove_command, "coming_contract", lambda *_: "tree-3 leafwise threads=7")
    result = prove(*SMALL, "--against", str(path), "--json", str(out))
    assert result.exit_code == 2
    assert f"error: --against {path}: the earlier report cannot be compared: its contract is " in (
        result.stderr
    )
    assert json.loads(out.read_text())["proved"] is True


@pytest.mark.skipif(
    "threads=" in mode.contract(Scheme()), reason="the contract of leafwise products names them"
)
def test_two_threads_give_the_bits_of_one(tmp_path: Path) -> None:
    names = ("matmul-row", "matmul-column", "ffn", "mlp-gathered")
    options = [part for name in names for part in ("--case", name)] + ["--degrees", "1,2,3"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    first = prove(*options, "--threads", "1", "--json", str(one))
    assert first.exit_code == 0, first.output
    second = prove(*options, "--threads", "2", "--against", str(one), "--json", str(two))
    assert second.exit_code == 0, second.output
    report = json.loads(two.read_text())
    assert report["against"]["compared"] == sum(len(case["tensors"]) for case in report["cases"])


def test_native_numerics_agree_with_torch_and_are_not_proved(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = prove(
        "--numerics", "native", "--case", "linear-row", "--degrees", "1,2,3", "--json", str(out)
    )
    assert result.exit_code == 1
    report = json.loads(out.read_text())
    assert (report["identical"], report["agrees_with_torch"]) == (False, True)
    assert all(tensor["agrees"] for tensor in report["cases"][0]["tensors"])
    last = result.stdout.splitlines()[-1]
    assert last.startswith("Not proved: in case linear-row, tensor ")
    assert "NO" in result.stdout


def test_options_reach_the_prover(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):  # noqa: N818 - not an error
        pass

    def catch(cases: tuple[Any, ...], **options: Any) -> None:
        options.pop("progress")
        raise Seen([case.name for case in cases], options)

    monkeypatch.setattr(prove_command, "prove_cases", catch)
    monkeypatch.setattr("traceback.print_exc", lambda: seen.append(sys.exc_info()[1]))
    seen: list[Any] = []
    prove(
        "--case", "ffn", "--case", "matmul-row", "--case", "ffn", "--degrees", "5,1",
        "--engine", "processes", "--threads", "2", "--numerics", "native", "--leaves", "5",
        "--seed", "7", "--allow-nonfinite", "--resume",
    )  # fmt: skip
    prove()
    first, second = (error.args for error in seen)
    assert first == (
        ["ffn", "matmul-row"],
        {
            "degrees": (1, 5),
            "engine": "processes",
            "transport": "auto",
            "threads": 2,
            "scheme": Scheme(leaves=5, numerics="native", seed=7),
            "seed": 7,
            "skipped": (),
            "allow_nonfinite": True,
            "few": 0,
            "resume": True,
        },
    )
    assert second[0] == [case.name for case in all_cases() if case.is_installed]
    assert second[1]["degrees"] == (1, 2, 3, 4)
    assert second[1]["engine"] == "threads"
    assert second[1]["threads"] is None
    assert second[1]["scheme"] == Scheme(seed=12345)


def test_the_list_names_every_case_and_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    result = prove("--list", "--json", str(path), columns=120)
    assert result.exit_code == 0
    assert result.stderr == ""
    listed = json.loads(path.read_text())["cases"]
    assert [case["name"] for case in listed] == [case.name for case in all_cases()]
    for case in all_cases():
        line = next(x for x in result.stdout.splitlines() if x.startswith(f"{case.name} "))
        assert case.source in line
        assert case.description.split()[0] in line


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["prove", "-h"], ["doctor", "--help"]])
def test_help_is_on_stdout(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert "Usage: shardproof" in result.stdout


def test_every_option_of_prove_is_in_its_help() -> None:
    text = prove("--help").stdout
    for option in (
        "--degrees", "--case", "--engine", "--transport", "--threads", "--numerics",
        "--leaves", "--seed",
        "--against", "--json", "--list",
    ):  # fmt: skip
        assert f"  {option} " in text or f"{option}  " in text
    for default in ("1,2,3,4", "threads", "invariant", "8", "12345"):
        assert f"[default: {default}]" in " ".join(text.split())


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"shardproof, version {__version__}\n")


def test_processes_give_the_same_bits(proof: Proof, tmp_path: Path) -> None:
    _, _, path = proof
    out = tmp_path / "report.json"
    done = prove(
        *SMALL, "--threads", "1", "--engine", "processes", "--against", str(path),
        "--json", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(out.read_text())
    assert (report["engine"], report["transport"]) == ("processes", CARRIER)
    assert report["against"]["same"] is True
    assert done.stdout.splitlines()[-1].endswith(f"Ranks: processes over {CARRIER}.")


def test_torchruns_ranks_give_the_same_bits_and_rank_0_speaks(tmp_path: Path) -> None:
    path, out = tmp_path / "threads.json", tmp_path / "report.json"
    cases = ("--case", "ffn", "--case", "linear-row")
    threads = prove(*cases, "--degrees", "3", "--json", str(path))
    assert threads.exit_code == 0, threads.output
    command = ["-m", "shardproof", "prove", *cases, "--against", str(path), "--json", str(out)]
    environment = os.environ | {"COLUMNS": "80"}
    done = warm.run_as_ranks([sys.executable, *command], ranks=2, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert (report["engine"], report["degrees"], report["proved"]) == ("torchrun", [1, 2], True)
    assert report["against"]["same"] is True
    assert report["against"]["compared"] == sum(len(case["tensors"]) for case in report["cases"])
    assert done.stdout.count("== ffn") == 1
    assert done.stdout.splitlines()[-1].endswith(f"Ranks: torchrun over {CARRIER}.")
