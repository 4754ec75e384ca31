"""docs/performance.md shows the report that lies beside it, and nothing else."""

import json

from benchmarks import page
from benchmarks.report import tables


def test_the_figures_are_those_of_the_report() -> None:
    text = page.PAGE.read_text()
    report = json.loads(page.REPORT.read_text())
    assert page.replaced(text, report) == text
    assert report["results"]
    assert report["all_reduce"]
    assert report["failed"] == []
    for table in tables(report):
        assert f"### {table.title}\n" in text
    assert page.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_other_figures_change_the_page_between_the_marks_alone() -> None:
    text = page.PAGE.read_text()
    report = json.loads(page.REPORT.read_text())
    report["results"][0]["median_ms"] = 123456.0
    changed = page.replaced(text, report)
    assert "123,456" in changed
    assert changed != text
    assert changed.split(page.BEGIN)[0] == text.split(page.BEGIN)[0]
    assert changed.split(page.END)[1] == text.split(page.END)[1]
