"""`prove --show`: the numbers of small tensors, and what a notebook prints beside ours."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from shardproof.cli.main import main
from shardproof.cli.output import PlainConsole
from shardproof.cli.report_text import show_values
from shardproof.prover import prove_cases
from shardproof.prover.cases import find_case, notebooks
from shardproof.prover.cases.notebooks import NOT_RECORDED, WITHOUT_TWO, compare_with_notebook
from shardproof.prover.recording import FEW
from shardproof.scheme import Scheme

NAMES = ("matmul-row", "matmul-column", "ffn", "linear-column", "linear-row", "mlp-gathered")


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    report = prove_cases([find_case(name) for name in NAMES], degrees=(1, 2), threads=1, few=FEW)
    return {case["name"]: case for case in report.as_dict()["cases"]}


def rows(cases: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return compare_with_notebook(find_case(name).printed, cases[name], seed=notebooks.MLP_SEED)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_prints_is_what_we_have(cases: dict[str, Any], name: str) -> None:
    found = rows(cases, name)
    assert found
    assert {row["same"] for row in found} <= {True, None}
    compared = [row for row in found if row["what"] not in ("exact", "max diff")]
    assert all(row["same"] is True or row["ours"] == NOT_RECORDED for row in compared)


def test_all_of_the_outputs_and_comparisons_of_a_notebook_are_there(cases: dict[str, Any]) -> None:
    found = rows(cases, "mlp-gathered")
    assert sum(row["what"].startswith("row ") for row in found) == 32
    assert sum(row["what"] == "exact" for row in found) == len(notebooks.MLP_CMP) == 18
    assert not any(row["ours"] == NOT_RECORDED for row in found)
    (difference,) = (row for row in rows(cases, "linear-row") if row["what"] == "max diff")
    assert difference["notebook"] == "4.10e-08"
    assert 0 < float(difference["ours"]) < 1e-6


def test_another_printed_result_is_not_the_same(cases: dict[str, Any]) -> None:
    printed = {one.label: one for one in notebooks.MLP_PRINTED}
    other = [
        dataclasses.replace(printed["W1_0.shape"], shape=(3, 6)),
        dataclasses.replace(printed["dW1_1"], close=False),
        dataclasses.replace(printed["out"], values=((0.1546, -0.5387),)),
    ]
    found = compare_with_notebook(other, cases["mlp-gathered"], seed=notebooks.MLP_SEED)
    assert [row["same"] for row in found] == [False, None, False, None, False]
    assert [row["what"] for row in found] == ["shape", "exact", "close", "max diff", "row 0"]


def test_the_part_of_a_rank_is_compared_by_itself(cases: dict[str, Any]) -> None:
    case = json.loads(json.dumps(cases["mlp-gathered"]))
    tensor = next(t for t in case["tensors"] if t["name"] == "hidden_layer.weight.grad")
    tensor["shown"]["ours"][3][0] += 1.0  # a row of the second rank
    said = {
        row["label"]: row["ours"]
        for row in compare_with_notebook(notebooks.MLP_CMP, case, seed=notebooks.MLP_SEED)
        if row["what"] == "close"
    }
    assert said["dW1_0"] == "True"
    assert said["dW1_1"] == "False"


def test_without_degree_2_there_are_no_two_devices() -> None:
    case = prove_cases([find_case("mlp-gathered")], degrees=(1,), threads=1, few=FEW)
    view = case.as_dict()["cases"][0]
    found = compare_with_notebook(notebooks.MLP_PRINTED, view, seed=notebooks.MLP_SEED)
    by_label = {(row["label"], row["what"]): row["ours"] for row in found}
    assert by_label["W1_0.shape", "shape"] == "run degree 2"
    assert by_label["W1.shape", "shape"] == "4x6"
    assert by_label["dW1_0", "close"] == WITHOUT_TWO
    assert by_label["TP - forward pass", "max diff"] == WITHOUT_TWO
    assert by_label["forward pass", "close"] == "True"
    assert by_label["out", "row 0"] == "0.1546 -0.5383"


def test_what_two_ranks_made_is_that_of_degree_2() -> None:
    """With plain sums degrees differ: neither the lowest nor the worst one is that of two ranks."""
    scheme = Scheme(numerics="native")
    cases = [find_case("mlp-gathered")]
    view = {
        degrees: prove_cases(cases, degrees=degrees, scheme=scheme, threads=1, few=FEW).as_dict()
        for degrees in ((2,), (1, 2, 4))
    }
    alone, among = (report["cases"][0] for report in view.values())
    tensors = [{each["name"]: each for each in case["tensors"]} for case in (alone, among)]
    differing = [name for name, each in tensors[1].items() if not each["identical"]]
    assert "output" in differing
    for name in differing:
        assert tensors[1][name]["shown"]["degree"] == 2
        assert tensors[1][name]["shown"]["ours"] == tensors[0][name]["shown"]["ours"], name
    printed = [one for one in notebooks.MLP_CMP if one.is_of_two or one.rank is not None]
    assert [one.label for one in printed if one.is_of_two] == ["TP - forward pass"]
    seen = [
        compare_with_notebook(printed, case, seed=notebooks.MLP_SEED) for case in (alone, among)
    ]
    assert seen[0] == seen[1]
    worse = json.loads(json.dumps(among))
    for tensor in worse["tensors"]:  # as if another degree were farther from plain torch
        tensor["torch"] = tensor["torch"] and {**tensor["torch"], "max_abs_diff": 1.0}
    assert compare_with_notebook(printed, worse, seed=notebooks.MLP_SEED) == seen[1]


def test_values_of_another_seed_are_not_compared() -> None:
    report = prove_cases([find_case("mlp-gathered")], degrees=(2,), threads=1, few=FEW, seed=7)
    found = compare_with_notebook(
        notebooks.MLP_PRINTED, report.as_dict()["cases"][0], seed=report.seed
    )
    assert (found[0]["what"], found[0]["notebook"], found[0]["ours"][0]) == ("seed", "12345", "7")
    (values,) = (row for row in found if row["label"] == "out")
    assert values["ours"] == "not compared: run seed 12345"
    assert {row["same"] for row in found} == {True, None}


def test_numbers_are_put_together_from_the_ranks(cases: dict[str, Any]) -> None:
    tensors = {tensor["name"]: tensor for tensor in cases["matmul-column"]["tensors"]}
    shown = tensors["w (initial)"]["shown"]
    assert torch.equal(torch.tensor(shown["ours"]), torch.arange(32.0).reshape(4, 8))
    assert shown["ours"] == shown["torch"]
    assert shown["held"] == {"1": [[4, 8]], "2": [[4, 4], [4, 4]]}
    large = cases["linear-row"]["tensors"][0]["shown"]
    assert (large["ours"], large["held"]["2"]) == (None, [[608, 512], [608, 512]])


def test_ranks_at_a_degree_that_does_not_divide_give_the_same_numbers() -> None:
    case = prove_cases([find_case("mlp-gathered")], degrees=(3,), threads=1, few=FEW)
    output = next(t for t in case.cases[0].tensors if t.name == "output")
    weight = next(t for t in case.cases[0].tensors if t.name == "output_layer.weight")
    assert output.shown is not None
    assert weight.shown is not None
    apart = torch.tensor(output.shown.ours) - torch.tensor(notebooks.MLP_OUTPUTS)
    assert apart.abs().max() < 1e-4
    assert weight.shown.held["3"] == ((1, 4), (1, 4), (0, 4))


def prove(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, ["prove", *arguments])


def test_the_command_shows_both_in_one_table(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = prove("--case", "matmul-row", "--degrees", "1,2", "--show", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "notebook prints" in result.stdout
    assert "(y_1+y_2).shape" in result.stdout
    assert "112.0000  118.0000" in result.stdout
    case = json.loads(path.read_text())["cases"][0]
    assert len(case["notebook"]) == len(notebooks.MATMUL_ROW_PRINTED)


def test_without_the_option_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = prove("--case", "matmul-row", "--degrees", "1,2", "--json", str(path))
    assert "notebook prints" not in result.stdout
    case = json.loads(path.read_text())["cases"][0]
    assert "notebook" not in case
    assert all(tensor["shown"] is None for tensor in case["tensors"])


def test_a_row_that_says_otherwise_and_a_case_without_a_notebook_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_values({"tensors": []}, PlainConsole())
    assert capsys.readouterr().out == ""
    row = {"section": "", "label": "W", "what": "shape", "notebook": "2", "ours": "3"}
    show_values({"tensors": [], "notebook": [row | {"same": False}]}, PlainConsole())
    assert "W" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_no_two_rows_of_a_narrow_table_have_one_name(
    width: int, cases: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = rows(cases, "linear-column")
    show_values({"tensors": [], "notebook": notebook}, PlainConsole(width=width))
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if "grad W matching nn.Linear" in line]
    assert len(named) == 2
    assert len(set(named)) == 2


def test_numbers_that_depend_on_the_degree_say_whose_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = {"held": {"1": [[]], "2": [[], []]}, "ours": 0.5, "torch": 0.5, "degree": 2}
    tensor = {"name": "loss", "shape": [], "shown": shown}
    show_values({"tensors": [tensor | {"identical": False}]}, PlainConsole(width=120))
    assert "; the numbers of degree 2)" in capsys.readouterr().out
    show_values({"tensors": [tensor | {"identical": True}]}, PlainConsole(width=120))
    assert "the numbers of" not in capsys.readouterr().out
