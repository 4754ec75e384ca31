"""Pages that are one program run, and show what they print; their pictures are what scripts draw.

Hashes may be others than those of the page, where a machine multiplies in another way: hashes that
are equal on the page must be equal in the run, and no others. Numbers that are not whole may differ
by rounding.
"""

import re
from xml.etree import ElementTree

import pytest

from drawn import DOCS, SVG, script, size_of, sizes, texts, width

PAGES = ("any-model.md", "cut-your-model.md")
HASH = re.compile(r"[0-9a-f]{16}")
NUMBER = re.compile(r"\d+\.\d+(?!\d|\.)")
PHONE, SMALLEST = 360, 10  # pixels; of a letter on a phone


def differences(page: str, run: str) -> list[str]:
    """Where a run prints something else than the page."""
    mine, its = HASH.findall(page), HASH.findall(run)
    found = []
    if [mine.index(each) for each in mine] != [its.index(each) for each in its]:
        found.append(f"hashes {its}, and on the page {mine}")
    texts = [HASH.sub("HASH", each) for each in (page, run)]
    numbers = [[float(each) for each in NUMBER.findall(text)] for text in texts]
    found += [
        f"page: {a}\n run: {b}"
        for a, b in zip(*numbers, strict=False)
        if abs(a - b) > 2e-3 * max(abs(a), abs(b))
    ]
    words = [NUMBER.sub("NUMBER", text) for text in texts]
    if words[0] != words[1]:
        found.append(f"page:\n{page}\nrun:\n{run}")
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PAGES)
def test_the_page_shows_what_its_blocks_print(name: str) -> None:
    runner = script("run_page")
    page = (DOCS / name).read_text(encoding="utf-8")
    outputs = runner.run(page, name)
    assert len(outputs) > 5
    for shown, output in zip(runner.printed(page), outputs, strict=True):
        assert differences(shown, output) == []


def test_the_same_hash_stands_at_every_degree() -> None:
    page = (DOCS / "cut-your-model.md").read_text(encoding="utf-8")
    found = re.findall(r"^degree (\d): losses (.*), weights ([0-9a-f]{16})$", page, re.MULTILINE)
    assert [degree for degree, _, _ in found] == ["1", "2", "3"] * 2
    assert len({each[1:] for each in found[:3]}) == len({each[1:] for each in found[3:]}) == 1


def test_a_page_that_shows_something_else_is_found() -> None:
    shown = f"degree 1: 0.5000 and {'a' * 16}\ndegree 2: 0.5000 and {'a' * 16}\n"
    assert differences(shown, shown.replace("a" * 16, "b" * 16).replace("0.5000", "0.5001")) == []
    assert differences(shown, shown.replace("0.5000", "0.5100", 1))
    assert differences(shown, shown.replace("a" * 16, "b" * 16, 1))
    assert differences(shown, shown.replace("degree 2", "degree 3"))
    assert differences(shown, "")


def test_a_block_is_filled_with_what_it_prints() -> None:
    runner = script("run_page")
    page = "a\n```python\nx = 1\n```\nb\n```python\nprint(x)\n```\n\n```text\n2\n```\nc\n"
    outputs = runner.run(page, "page.md")
    assert (outputs, runner.printed(page)) == (["", "1\n"], ["", "2\n"])
    assert runner.filled(page, outputs) == page.replace("2\n", "1\n")


# -- pictures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> dict[str, str]:
    drawing = script("draw_any_model")
    return {
        "labels.svg": drawing.draw_labels(),
        "fused.svg": drawing.draw_fused(drawing.shapes()),
    }


def test_the_pictures_are_what_their_script_draws(pictures: dict[str, str]) -> None:
    for name, picture in pictures.items():
        assert (DOCS / name).read_text(encoding="utf-8") == picture
        assert f"({name})" in (DOCS / "any-model.md").read_text(encoding="utf-8")


def test_the_pictures_are_readable_on_a_phone_and_in_the_dark(pictures: dict[str, str]) -> None:
    measure = script("drawing").width_of
    for picture in pictures.values():
        known, wide = sizes(picture), width(picture)
        for label in texts(picture):
            size, classes = size_of(label, known), label.attrib["class"].split()
            assert size * PHONE / wide >= SMALLEST, label.text
            long = measure(label.text or "", size, is_mono="mono" in classes) * 1.08
            left = float(label.attrib["x"]) - (long / 2 if "middle" in classes else 0)
            assert 0 <= left < left + long <= wide, label.text
        assert "prefers-color-scheme:dark" in picture
        assert ElementTree.fromstring(picture).attrib["role"] == "img"


def test_the_rows_of_the_fused_weight_are_those_of_whole_heads(pictures: dict[str, str]) -> None:
    """By arithmetic alone: head h of 6 has rows 2h and 2h + 1 of each block of 12."""
    told = [label.text for label in texts(pictures["fused.svg"]) if label.text]
    for rank in range(3):
        for block in range(3):
            first = 12 * block + 4 * rank
            assert f"rows {first}-{first + 3}" in told


def test_the_cells_of_the_ranks_are_the_heads_that_their_queries_need(
    pictures: dict[str, str],
) -> None:
    """By arithmetic alone: query head h needs the head of keys h // 3."""
    rows: dict[float, list[str]] = {}
    for label in ElementTree.fromstring(pictures["labels.svg"]).iter(f"{SVG}text"):
        if "cell" in label.attrib["class"]:
            rows.setdefault(float(label.attrib["y"]), []).append(label.text or "")
    for rank, cells in enumerate([rows[y] for y in sorted(rows)][-3:]):
        mine = range(2 * rank, 2 * rank + 2)
        groups = sorted({head // 3 for head in mine})
        wanted = [
            *("abcdef"[head] for head in mine),
            *("KL"[group] for group in groups),
            *("VW"[group] for group in groups),
        ]
        assert cells == wanted
