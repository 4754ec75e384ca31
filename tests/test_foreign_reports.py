"""`--against` reads any file: each that is no basis for a comparison is one error, exit code 2."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from foreign import LONGEST, in_time, odd_files
from invariance import contract_of_one_thread
from shardproof.cli import prove as prove_command
from shardproof.cli.main import main
from shardproof.cli.output_file import LARGEST_REPORT
from shardproof.cli.prove import EarlierReport
from shardproof.prover import Comparison

SHA, OTHER = "aa" * 32, "bb" * 32


class WorkStartedError(Exception):
    """The report was taken."""


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise WorkStartedError

    monkeypatch.setattr(prove_command, "prove_cases", refuse)


def tensors(*names: Any, sha256: Any = None) -> list[dict[str, Any]]:
    return [{"name": name, "sha256": {"1": SHA} if sha256 is None else sha256} for name in names]


def one(name: Any, listed: Any = None) -> dict[str, Any]:
    return {"name": name, "tensors": tensors("output") if listed is None else listed}


def report(**changes: Any) -> str:
    document = {
        "proved": True,
        "numerics": "invariant",
        "leaves": 8,
        "seed": 12345,
        "contract": contract_of_one_thread(),
        "cases": [one("ffn")],
    }
    return json.dumps(document | changes)


def more(text: str) -> str:
    """The report with something after its last entry."""
    return f"{report()[:-1]}, {text}}}"


DEEP = 100_000
# Label -> content, and what the message says.
WRONG: dict[str, tuple[str | bytes, str]] = {
    "lists without end": ("[" * DEEP, "nested too deeply"),
    "lists nested deep": ("[" * DEEP + "]" * DEEP, "nested too deeply"),
    "objects nested deep": ('{"a":' * DEEP + "1" + "}" * DEEP, "nested too deeply"),
    "depth beside what is right": (more('"x": ' + "[" * DEEP + "]" * DEEP), "nested too deeply"),
    "a number too long to read": (more(f'"x": {"9" * 5000}'), "5,000 digits"),
    "a seed too long to compare": (more(f'"x": {"9" * 999}').replace("12345", "9" * 900), "seed"),
    "NaN": (report(seed=float("nan")), "NaN is no JSON"),
    "Infinity": (report(leaves=float("inf")), "Infinity is no JSON"),
    "a number that is not finite": (more('"x": 1e999'), "1e999 is not finite"),
    "a key that is there twice": ('{"proved": false, ' + report()[1:], "'proved' is there twice"),
    "a key twice inside": (more('"x": {"a": 1, "a": 2}'), "'a' is there twice"),
    "a mark of order": (b"\xef\xbb\xbf" + report().encode(), "BOM"),
    "UTF-16": (report().encode("utf-16"), "is not text"),
    "no text": (b"\xff\xfe\x00", "is not text"),
    "zeros": (b"\0" * 1000, "is not JSON"),
    "blanks": (" " * 10**6, "is not JSON"),
    "nothing": ("", "is not JSON"),
    "two reports": (report() * 2, "Extra data"),
    "a number": ("5", "holds a int"),
    "null": ("null", "holds a NoneType"),
    "not proved": (report(proved=False), "it says that it was not proved"),
    "proved in words": (report(proved="true"), "'proved' is 'true'"),
    "proved as a number": (report(proved=1), "'proved' is 1"),
    "proved as null": (report(proved=None), "'proved' is None"),
    "a case that was not proved": (
        report(cases=[one("ffn") | {"proved": False}]),
        "case 'ffn' was not proved",
    ),
    "no leaves": (report(leaves=0), "leaves are 0"),
    "leaves in words": (report(leaves="8"), "leaves are '8'"),
    "a part of a leaf": (report(leaves=8.0), "leaves are 8.0"),
    "true leaves": (report(leaves=True), "leaves are True"),
    "a seed in words": (report(seed="12345"), "seed is '12345'"),
    "a seed with a point": (report(seed=12345.0), "seed is 12345.0"),
    "another seed": (report(seed=1), "its seed is 1, this one's is 12345"),
    "a contract that is a list": (report(contract=[]), r"contract is \[\]"),
    "an empty contract": (report(contract=""), "contract is ''"),
    "a contract without end": (report(contract="x" * 10**6), r"\(1,000,000 characters\)"),
    "another contract": (report(contract="tree-1 leaves=8"), "contract is 'tree-1 leaves=8'"),
    "numerics that nobody knows": (report(numerics="exact"), "numerics are 'exact'"),
    "numerics in a list": (report(numerics=["native"]), r"numerics are \['native'\]"),
    "cases that are a number": (report(cases=5), "'cases' is not a list"),
    "a case that is a number": (report(cases=[5]), "'cases' is not a list"),
    "tensors that are a number": (report(cases=[one("ffn", 5)]), "'cases' is not a list"),
    "a case without a name": (report(cases=[{"tensors": []}]), "has no name"),
    "a case named 5": (report(cases=[one("ffn"), one(5)]), "has the name 5"),
    "a case named null": (report(cases=[one("ffn"), one(None)]), "has the name None"),
    "a case named by a list": (report(cases=[one("ffn"), one([1])]), r"has the name \[1\]"),
    "a case named by nothing": (report(cases=[one("ffn"), one("")]), "has the name ''"),
    "a case that is there twice": (report(cases=[one("ffn")] * 2), "'ffn', which is there twice"),
    "a tensor named 5": (report(cases=[one("ffn", tensors(5))]), "has the name 5"),
    "a tensor named by an object": (report(cases=[one("ffn", tensors({}))]), r"has the name {}"),
    "a tensor that is there twice": (report(cases=[one("ffn", tensors("w", "w"))]), "'w', which"),
    "a hash that is a number": (
        report(cases=[one("ffn", tensors("w", sha256={"1": 5}))]),
        "tensor 'w' of case 'ffn' has the hash 5",
    ),
    "a hash that is a list": (
        report(cases=[one("ffn", tensors("w", sha256={"1": []}))]),
        r"has the hash \[\]",
    ),
    "a hash that is none": (
        report(cases=[one("ffn", tensors("w", sha256={"1": "zz"}))]),
        "has the hash 'zz'",
    ),
    "hashes that are a text": (report(cases=[one("ffn", tensors("w", sha256=SHA))]), "no hashes"),
    "a degree that is none": (
        report(cases=[one("ffn", tensors("w", sha256={"one": SHA}))]),
        "a hash at 'one', which is no degree",
    ),
    "no tensors": (report(cases=[one("ffn", [])]), "nothing in common"),
    "twenty thousand other cases": (
        report(cases=[one(f"case-{place}") for place in range(20_000)]),
        "19,980 more, this one has ffn",
    ),
}


def against(path: object) -> Result:
    with in_time():
        return CliRunner().invoke(
            main, ["prove", "--case", "ffn", "--threads", "1", "--against", str(path)]
        )


def assert_refused(result: Result, says: str) -> None:
    assert result.exit_code == 2, result.output[-400:]
    assert result.stderr.startswith("error: --against")
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < LONGEST
    assert re.search(says, result.stderr), result.stderr


@pytest.mark.parametrize("label", WRONG)
def test_a_report_that_is_no_basis_is_refused(label: str, tmp_path: Path) -> None:
    content, says = WRONG[label]
    path = tmp_path / "earlier.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(against(path), says)


def test_a_path_that_is_no_report_is_refused(tmp_path: Path) -> None:
    for path, says in odd_files(tmp_path).values():
        assert_refused(against(path), says)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(10**10)  # nothing of it is on the disk
    assert_refused(against(path), f"has 10,000,000,000 bytes, .* more than {LARGEST_REPORT:,}")


def test_a_report_that_can_serve_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "earlier.json"
    others = [one("ffn"), one("other", tensors("a", "b", sha256={}))]
    for text in (report(), report(cases=others), more('"x": "\\ud800"')):
        path.write_text(text)
        result = against(path)
        assert "WorkStartedError" in result.stderr, result.stderr[-400:]


def test_a_native_report_may_be_unproved_and_the_comparison_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EarlierReport, "compare", lambda earlier, report: Comparison(3, ()))
    said = prove_command.against(EarlierReport("native.json", {"proved": False}), {})
    assert said["text"].endswith("as in native.json, which says that it was not proved.")
    said = prove_command.against(EarlierReport("native.json", {"proved": True}), {})
    assert said["text"].endswith("as in native.json.")
