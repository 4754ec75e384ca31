"""docs/models.md shows what the plans of models say and what the degrees proved."""

import functools
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import shardproof as sp

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[1] / "docs" / "draw_models.py"
MODELS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Olmo2", "Granite")


@pytest.fixture
def drawing() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("draw_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_models"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["draw_models"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_shows_every_model_as_its_plan_has_it(drawing: ModuleType) -> None:
    page = drawing.PAGE.read_text()
    table = page.split(drawing.BEGIN)[1].split(drawing.END)[0]
    rows = [cells(line) for line in table.splitlines() if line.startswith("| ")][1:]
    assert tuple(drawing.FAMILIES) == MODELS
    assert [row[0] for row in rows] == [drawing.FAMILIES[family][0] for family in MODELS]
    for family, row in zip(MODELS, rows, strict=True):
        assert row[1:-1] == drawing.planned_cells(family)
        assert row[-1].startswith("1, 2, 3, 4, 8 (")


def test_the_command_writes_between_the_marks_alone(
    drawing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "models.md"
    shutil.copy(drawing.PAGE, page)
    before = page.read_text()
    monkeypatch.setattr(drawing, "PAGE", page)
    monkeypatch.setattr(drawing, "FAMILIES", {"Qwen3": drawing.FAMILIES["Qwen3"]})
    monkeypatch.setattr(drawing, "prove", functools.partial(drawing.prove, degrees=(1, 3)))
    drawing.main()
    after = page.read_text()
    assert "| 1, 3 (54) |" in after
    assert "| Llama |" not in after
    assert after.split(drawing.BEGIN)[0] == before.split(drawing.BEGIN)[0]
    assert after.split(drawing.END)[1] == before.split(drawing.END)[1]


def test_other_bits_and_other_bytes_are_said(
    drawing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One product per shard has other bits at every degree."""
    native = functools.partial(sp.parallelize, scheme=sp.Scheme(numerics="native"))
    monkeypatch.setattr(sp, "parallelize", native)
    proof = drawing.prove("Llama", (1, 2))
    assert proof.same == (1,)
    assert list(proof.other) == [2]
    assert "; not 2 (" in drawing.row("Llama", proof)
    page = tmp_path / "models.md"
    shutil.copy(drawing.PAGE, page)
    monkeypatch.setattr(drawing, "PAGE", page)
    monkeypatch.setattr(drawing, "FAMILIES", {"Llama": drawing.FAMILIES["Llama"]})
    monkeypatch.setattr(drawing, "prove", lambda family: proof)
    with pytest.raises(SystemExit, match="1"):
        drawing.main()
