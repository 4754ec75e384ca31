"""The page of `shardproof check --html`."""

from html import escape
from pathlib import Path

import pytest

from shardproof.checker.check_report import (
    CheckedLayout,
    CheckedTensor,
    CheckReport,
    FirstDifference,
)
from shardproof.checker.drawing import drawing_of
from shardproof.checker.mistake_kinds import KINDS
from shardproof.showing.check_page import check_page
from test_show_page import BROWSER, FRAME, WATCH, browse

NAME = "layers.0.<script>&"  # no dot in its last part


def report_of(kind: str | None, *, right: bool = False) -> CheckReport:
    tensors = (
        CheckedTensor("output of layers.0", "layers.0", 1, "Replicate", 1e-7, 1e-16, "rounding"),
        CheckedTensor(f"output of {NAME}", NAME, 1, "none", 0.2, 0.2, "wrong"),
    )
    return CheckReport(
        right=right,
        verdict=f"Wrong at degree 2, in the forward of {NAME}.",
        module=None if right else NAME,
        kind=kind,
        evidence="" if kind is None else "the output has the bias 2 times",
        phase="forward",
        source="program.py:7",
        degree=2,
        precision="fp32 and fp64",
        note="",
        tensors=tensors[:1] if right else tensors,
        layouts=(CheckedLayout("w", "w", (4, 2), "Shard(0)", "", ("0:2", "2:4")),),
        differences=(FirstDifference("output", 1, (0, 3), 0.5, 0.25),),
        modules=(("", "Model"), ("layers", "ModuleList"), ("layers.0", "Block"), (NAME, "Row")),
    )


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_each_kind_has_a_page_and_a_drawing(kind: str | None) -> None:
    page = check_page(report_of(kind))
    assert escape(f"Wrong at degree 2, in the forward of {NAME}.") in page
    assert "<script>&" not in page
    assert "<svg" in page
    for rank in drawing_of(kind, 2).ranks:
        assert escape(rank) in page
    if kind is not None:
        assert escape(KINDS[kind][0]) in page
    assert "http" not in page.replace("http-equiv", "")


def test_every_kind_has_a_drawing_of_its_own() -> None:
    drawings = {drawing_of(kind, 3) for kind in KINDS}
    assert len(drawings) == len(KINDS)
    for each in drawings:
        assert len(each.ranks) == 3
        assert "{" not in "".join((*each.ranks, each.result, each.right))


def test_a_right_report_has_no_fault() -> None:
    page = check_page(report_of(None, right=True))
    assert "The first fault" not in page
    assert 'class="good"' in page


LOOK = """<script>
(() => {
  const root = document.documentElement;
  const expect = (holds, what) => { if (!holds) faults.push(what); };
  expect(root.scrollWidth <= root.clientWidth, "the page is wider than the window");
  const heads = () => [...document.querySelectorAll("summary")].filter((e) => e.checkVisibility());
  const opened = heads().length;
  expect(opened === 4, "the way to the faulty module is open");
  document.getElementById("close").click();
  expect(heads().length < opened, "close all");
  document.getElementById("open").click();
  expect(heads().length === opened, "open all");
  const result = document.createElement("pre");
  result.id = "selftest";
  result.textContent = JSON.stringify({ faults, width: root.clientWidth });
  document.body.append(result);
})();
</script>"""


def with_test(page: str) -> str:
    """The page with the test in it."""
    return page.replace("<main>", WATCH + "<main>").replace("</body>", LOOK + "</body>")


@pytest.mark.skipif(BROWSER is None, reason="needs a browser on PATH")
def test_the_page_works_in_a_wide_window(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(with_test(check_page(report_of("bias on every rank"))), encoding="utf-8")
    found, console = browse(page, "--window-size=1280,900")
    assert found["faults"] == []
    assert found["width"] > 1000
    assert console == []


@pytest.mark.skipif(BROWSER is None, reason="needs a browser on PATH")
def test_the_page_works_on_a_phone(tmp_path: Path) -> None:
    page = with_test(check_page(report_of("sum missing")))
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME)
    found, console = browse(frame, "--blink-settings=preferredColorScheme=0")
    assert found["faults"] == []
    assert found["width"] <= 360
    assert console == []
