"""docs/performance.md shows the report that lies beside it, and nothing else."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from shardproof.bench.tables import tables

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    path = DOCS / "draw_performance.py"
    spec = importlib.util.spec_from_file_location("draw_performance", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_those_of_the_report(drawing: ModuleType) -> None:
    page = drawing.PAGE.read_text()
    report = json.loads(drawing.REPORT.read_text())
    assert drawing.replaced(page, report) == page
    assert report["results"]
    assert report["all_reduce"]
    assert report["failed"] == []
    for table in tables(report):
        assert f"### {table.title}\n" in page
    assert drawing.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_other_figures_change_the_page_between_the_marks_alone(drawing: ModuleType) -> None:
    page = drawing.PAGE.read_text()
    report = json.loads(drawing.REPORT.read_text())
    report["results"][0]["median_ms"] = 123456.0
    changed = drawing.replaced(page, report)
    assert "123,456" in changed
    assert changed != page
    assert changed.split(drawing.BEGIN)[0] == page.split(drawing.BEGIN)[0]
    assert changed.split(drawing.END)[1] == page.split(drawing.END)[1]
