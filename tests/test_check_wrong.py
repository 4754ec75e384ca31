"""Programs that are wrong: `check` finds each, and names the module and the kind of most."""

from collections import Counter
from pathlib import Path

import pytest

from check_corpus import expected, judged, programs
from shardproof.checker.check_report import CheckReport
from shardproof.checker.mistake_kinds import KINDS

# These are found, and the kind is not named.
UNNAMED = {"wrong_label_smoothing_of_a_slice", "wrong_loss_mean_of_rank_means"}
WRONG = programs("wrong")
_reports: dict[Path, CheckReport] = {}


@pytest.mark.parametrize("path", WRONG, ids=lambda path: path.stem)
def test_a_wrong_program_is_found(path: Path) -> None:
    report = _reports.setdefault(path, judged(path))
    assert not report.right
    right = expected(path)
    assert right.has_module(report), report.verdict
    assert report.kind == (None if path.stem in UNNAMED else right.kind), report.verdict
    assert report.verdict.startswith("Wrong at degree 2")
    assert "failed" not in report.note


def test_every_kind_is_in_several_programs() -> None:
    assert len(WRONG) >= 60
    counts = Counter(kind for path in WRONG if (kind := expected(path).kind) is not None)
    assert set(counts) == set(KINDS)
    assert {kind for kind, count in counts.items() if count < 2} == set()


def test_most_are_named() -> None:
    if len(_reports) < len(WRONG):
        pytest.skip("needs the reports of all programs, which the tests above make")
    pairs = [(expected(path), report) for path, report in _reports.items()]
    modules = [right.has_module(report) for right, report in pairs]
    kinds = [report.kind == right.kind for right, report in pairs]
    assert sum(modules) >= 0.9 * len(pairs)
    assert sum(kinds) >= 0.8 * len(pairs)
