"""Programs that are right: `check` accuses none of them."""

from pathlib import Path

import pytest

from check_corpus import FOLDER, judged, programs


@pytest.mark.parametrize("path", programs("right"), ids=lambda path: path.stem)
def test_a_right_program_is_not_accused(path: Path) -> None:
    report = judged(path)
    assert report.right, report.verdict
    assert (report.module, report.kind) == (None, None)
    assert {each.verdict for each in report.tensors} <= {"same", "rounding"}


def test_there_are_enough_and_the_page_has_all() -> None:
    assert len(programs("right")) >= 25
    page = (FOLDER.parents[1] / "docs" / "check-programs.md").read_text()
    for kind in ("right", "wrong"):
        for path in programs(kind):
            assert f"| {path.stem.removeprefix(f'{kind}_')} |" in page, "run tests/check_table.py"
