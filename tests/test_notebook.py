"""The notebook runs from its first cell to its last and shows what it has stored."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "cut_a_llama.ipynb"
# Hashes and losses are those of one machine.
OF_A_MACHINE = re.compile(r"\b[0-9a-f]{16}\b|\b\d+\.\d{4}\b|\[\d+(, \d+)*\]")


def shown(path: Path) -> list[list[str]]:
    """What every code cell shows: text, and the kinds of everything else."""
    return [
        [kind for output in cell.outputs for kind in _shown(output)]
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
    ]


def _shown(output: Any) -> list[str]:
    if output.output_type == "stream":
        return [output.name, OF_A_MACHINE.sub("...", output.text)]
    return [output.output_type, *output.get("data", {})]


def test_the_stored_notebook_has_been_run_without_an_error() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    said = [word for cell in shown(NOTEBOOK) for word in cell]
    assert not {"stderr", "error"} & set(said)
    assert "image/png" in said
    assert any("as the plan predicted, on every rank: True" in word for word in said)
    assert any("the same bits at every degree: True" in word for word in said)


def test_it_shows_the_same_here(tmp_path: Path) -> None:
    for needed in ("ipykernel", "matplotlib", "nbclient", "transformers"):
        pytest.importorskip(needed)
    again = tmp_path / "again.ipynb"
    script = ROOT / "docs" / "execute_notebook.py"
    ended = subprocess.run(
        [sys.executable, str(script), str(NOTEBOOK), "--output", str(again)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert shown(again) == shown(NOTEBOOK)


def test_other_text_is_seen_and_other_hashes_are_not(tmp_path: Path) -> None:
    stored, changed = NOTEBOOK.read_text(), tmp_path / "changed.ipynb"
    changed.write_text(stored.replace("99.7 % of them cut", "99.6 % of them cut"))
    assert shown(changed) != shown(NOTEBOOK)
    changed.write_text(re.sub(r"gradients [0-9a-f]{16}", "gradients " + 16 * "0", stored))
    assert changed.read_text() != stored
    assert shown(changed) == shown(NOTEBOOK)


def test_a_cell_that_fails_writes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    failing, target = tmp_path / "failing.ipynb", tmp_path / "target.ipynb"
    cell = nbformat.v4.new_code_cell("assert 1 == 2, 'one is not two'")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), failing)
    script = ROOT / "docs" / "execute_notebook.py"
    ended = subprocess.run(
        [sys.executable, str(script), str(failing), "--output", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "one is not two" in ended.stderr
    assert not target.exists()
