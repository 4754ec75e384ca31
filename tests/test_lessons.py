"""The lessons run at degrees 1, 2 and 3, and their pages show what they print.

A page is compared with a run word by word. These may be others: differences of rounding, hashes of
plain torch's products (those that end in ".."), the words "yes" and "no", which say whether plain
torch has the same bits, and memory that was held (marked with "~"), within 10%.

Where a run's bits are not those of the page, hashes in one line must be equal where those of the
page are equal. Of a trace only the collectives and the updates are then compared, because products
have other steps.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from shardproof.mistakes import all_mistakes

ROOT = Path(__file__).parents[1]
LESSONS = ROOT / "docs" / "lessons"
NAMES = [path.stem for path in sorted(LESSONS.glob("[0-9][0-9]_*.py"))]
HASH = re.compile(r"[0-9a-f]{16}")
ROUNDING = 1e-3  # what is smaller is a difference of rounding
LOOSE = 0.1  # relative, of bytes that a rank holds: memory is given back a little sooner or later
OTHER = 2.0  # the same, where products are computed in another way
TRACED = "phase"  # with this word begin the steps of a trace
ALIKE = re.compile(r"\w+ +(all_reduce|all_gather|reduce_scatter|update) ")  # in every trace
BITS = "bits of:"


def _maker() -> ModuleType:
    found = importlib.util.spec_from_file_location("make_lessons", ROOT / "docs/make_lessons.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["make_lessons"] = module
    found.loader.exec_module(module)
    return module


maker = _maker()


def cells_of(name: str) -> list:
    return maker.cells_of((LESSONS / f"{name}.py").read_text(encoding="utf-8"))


def stored(name: str) -> dict:
    return json.loads((LESSONS / f"{name}.ipynb").read_text(encoding="utf-8"))


def printed_on_page(name: str) -> list[str]:
    """What the cells of code print, by the page: blocks of text that follow blocks of code."""
    page = (LESSONS / f"{name}.md").read_text(encoding="utf-8")
    page = page.replace("```\n\n</details>\n", "```\n")  # of code that is folded
    found = re.findall(r"^```python\n.*?^```\n(?:\n```text\n(.*?)^```)?", page, re.M | re.S)
    return list(found)


def degree_of_page(name: str) -> int:
    found = re.search(r"^DEGREE = (\d)$", (LESSONS / f"{name}.py").read_text(), re.M)
    assert found is not None
    return int(found[1])


def same_word(page: str, run: str, same_bits: bool) -> bool:
    """Whether one word of a page and of a run mean the same."""
    if page == run or (page in ("yes", "no") and run in ("yes", "no")):
        return True
    if HASH.fullmatch(page) and HASH.fullmatch(run):
        return not same_bits
    if page.endswith("..") and run.endswith(".."):
        return True
    page, run = page.rstrip("),;"), run.rstrip("),;")
    if page.startswith("~") and run.startswith("~"):
        a, b = (float(re.sub(r"[~,%]", "", word)) for word in (page, run))
        return abs(a - b) <= (LOOSE if same_bits else OTHER) * min(a, b)
    try:
        a, b = float(page), float(run)
    except ValueError:
        return False
    if abs(a) < ROUNDING and abs(b) < ROUNDING:
        return True
    is_whole = page.isdigit() and run.isdigit()
    return not is_whole and abs(a - b) <= 2e-3 * max(abs(a), abs(b))


def are_renamed(page: str, run: str) -> bool:
    """Whether hashes that are equal in a line of the page are equal in the run, and no others."""
    mine, its = HASH.findall(page), HASH.findall(run)
    return [mine.index(each) for each in mine] == [its.index(each) for each in its]


def differences(page: str, run: str, *, same_bits: bool) -> list[str]:
    """Where a run prints something else than the page."""
    lines = [
        [line for line in text.splitlines() if line.strip(" -") and not line.startswith(BITS)]
        for text in (page, run)
    ]
    if page.startswith(TRACED) and run.startswith(TRACED) and not same_bits:
        lines = [list(filter(ALIKE.match, each)) for each in lines]
    if len(lines[0]) != len(lines[1]):
        return [f"{len(lines[0])} lines on the page, {len(lines[1])} in the run"]
    found = []
    for mine, its in zip(*lines, strict=True):
        words = mine.split(), its.split()
        is_same = len(words[0]) == len(words[1]) and all(
            same_word(a, b, same_bits) for a, b in zip(*words, strict=True)
        )
        if not is_same or not are_renamed(mine, its):
            found.append(f"page: {mine}\n run: {its}")
    return found


def bits_line(outputs: list[str]) -> str:
    lines = [line for text in outputs for line in text.splitlines() if line.startswith(BITS)]
    assert len(lines) == 1, "a lesson says once what its hashes depend on"
    return lines[0]


@pytest.fixture(scope="module", params=NAMES)
def lesson(request: pytest.FixtureRequest) -> tuple[str, dict[int, list]]:
    """A lesson and its outputs at each degree."""
    cells = cells_of(request.param)
    degrees = {1, 2, 3, degree_of_page(request.param)}
    runs = {degree: maker.run(cells, {"DEGREE": degree}) for degree in sorted(degrees)}
    return request.param, runs


def test_there_are_five_lessons() -> None:
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05"]
    for name in NAMES:
        assert f"({name}.md)" in (LESSONS / "README.md").read_text(), "the index names each page"


def test_the_page_shows_what_the_lesson_prints(lesson: tuple[str, dict[int, list]]) -> None:
    name, runs = lesson
    page, run = printed_on_page(name), [out.printed for out in runs[degree_of_page(name)]]
    same_bits = bits_line(page) == bits_line(run)
    assert len(page) == len(run)
    for mine, its in zip(page, run, strict=True):
        assert differences(mine, its, same_bits=same_bits) == [], "run docs/make_lessons.py"


def test_hashes_are_the_same_at_every_degree(lesson: tuple[str, dict[int, list]]) -> None:
    name, runs = lesson
    hashes = {
        degree: [found for out in outputs for found in HASH.findall(out.printed)]
        for degree, outputs in runs.items()
    }
    assert hashes[1]
    assert all(found == hashes[1] for found in hashes.values()), name


def test_every_lesson_draws_its_own_numbers(lesson: tuple[str, dict[int, list]]) -> None:
    name, runs = lesson
    drawn = [out.picture for out in runs[degree_of_page(name)] if out.picture is not None]
    files = [LESSONS / "pictures" / f"{name[:2]}-{i + 1}.svg" for i in range(len(drawn))]
    assert drawn
    assert sorted((LESSONS / "pictures").glob(f"{name[:2]}-*.svg")) == files
    for picture, file in zip(drawn, files, strict=True):
        texts = [re.findall(r">([^<]+)</text>", svg) for svg in (picture.svg, file.read_text())]
        assert all(same_word(*words, True) for words in zip(*texts, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_names_mistakes_of_the_gallery(name: str) -> None:
    page = (LESSONS / f"{name}.md").read_text()
    named = set(re.findall(r"`shardproof break ([a-z-]+)`", page)) - {"--list"}
    assert named <= {mistake.name for mistake in all_mistakes()}
    assert named or name[:2] in ("01", "02")


@pytest.mark.parametrize("name", NAMES)
def test_notebook_and_page_are_made_from_the_source(name: str) -> None:
    cells, notebook = cells_of(name), stored(name)
    assert ["".join(cell["source"]) for cell in notebook["cells"]] == [c.source for c in cells]
    outputs = maker.outputs_of(notebook, maker.Drawn)
    assert (LESSONS / f"{name}.md").read_text() == maker.page_of(cells, outputs, name)
    kinds = {o["output_type"] for c in notebook["cells"] for o in c.get("outputs", ())}
    assert kinds == {"stream", "execute_result"}, "no error, nothing on stderr"


@pytest.mark.parametrize("name", NAMES)
def test_every_lesson_has_its_parts(name: str) -> None:
    page = (LESSONS / f"{name}.md").read_text()
    assert [page.count(f"<details><summary>{i}. ") for i in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert page.count("<details>") == page.count("</details>") == 3 + page.count("<summary>code<")
    assert page.count("shardproof break --list") == 1
    broken = page.partition("## Break it")[2]
    assert broken.count("# was: ") == 3
    if name[:2] in ("01", "02"):  # what is compared with a notebook does not interrupt these
        assert "## Beside the notebook" in broken.partition("## Questions")[2]
    for heading in ("## The mathematics", "## The bits", "## Break it", "## Questions"):
        assert heading in page or (heading, name[:2]) == ("## The bits", "03")
    assert ("## Beside the notebook" in page) == (name[:2] != "05")


NOT_PRINTED = (("02", 300), ("05", 80))  # a mean, and a part of a message
FORMULA = re.compile(r"`([\d (*/+)-]+) = (\d+)`")


def formulas_of(text: str) -> list[tuple[str, int]]:
    """Arithmetic in the text of a page, and what it says comes out."""
    return [(found[1], int(found[2])) for found in FORMULA.finditer(" ".join(text.split()))]


def test_arithmetic_in_the_text_is_right_and_its_result_was_measured() -> None:
    assert formulas_of("so `2 * (3 + 4) = 14` bytes, `h = 3`") == [("2 * (3 + 4)", 14)]
    found = {name: formulas_of((LESSONS / f"{name}.md").read_text()) for name in NAMES}
    assert [len(formulas) for formulas in found.values()] == [1, 4, 0, 2, 1]
    for name, formulas in found.items():
        printed = " ".join(printed_on_page(name)).split()
        for left, right in formulas:
            assert eval(left) == right  # digits and signs
            assert (name[:2], right) in NOT_PRINTED or str(right) in printed


def test_the_mean_of_what_ranks_send_is_the_formula_of_the_text() -> None:
    """2 b (d - 1) / d, where every rank sends one node."""
    lines = [line.split() for line in "".join(printed_on_page("02_feed_forward")).splitlines()]
    sent = {
        int(w[0]): [int(b) for b in w[7:]] for w in lines if w[2:4] == ["forward", "all_reduce"]
    }
    assert set(sent) == {2, 3, 4, 8}
    for degree, each in sent.items():
        assert len(each) == degree
        assert (sum(each) == 2 * 200 * (degree - 1)) == (degree != 3)


def test_a_lesson_runs_in_jupyter(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = maker.notebook_of(cells_of("01_one_product"))
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(LESSONS)}})
    client.execute()
    found = [out.printed for out in maker.outputs_of(notebook, maker.Drawn)]
    page = printed_on_page("01_one_product")
    same_bits = bits_line(page) == bits_line(found)
    assert nbformat.validate(notebook) is None
    for mine, its in zip(page, found, strict=True):
        assert differences(mine, its, same_bits=same_bits) == []


# -- the comparison itself -------------------------------------------------------------------------

LINE = "row y  0.4137  3.0e-08  (2, 8)  6fe0e56cb1049d3d  f419f9..  2,490,368  50.0%  ~50.3%  yes"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("row y", "row x"),
        ("0.4137", "0.4237"),
        ("0.4137", "3.0e-08"),
        ("3.0e-08", "0.4137"),
        ("(2, 8)", "(2, 4)"),
        ("6fe0", "6fe1"),
        ("2,490,368", "2,490,369"),
        ("50.0%", "50.1%"),
        ("~50.3%", "~60.3%"),
        ("~50.3%", "50.3%"),
        ("yes", "True"),
        ("(2, 8)", ""),
    ],
)
def test_another_number_is_seen(old: str, new: str) -> None:
    assert differences(LINE, LINE, same_bits=True) == []
    assert differences(LINE, LINE.replace(old, new), same_bits=True) != []


@pytest.mark.parametrize(
    ("old", "new"), [("3.0e-08", "0"), ("f419", "f41a"), ("yes", "no"), ("~50.3%", "~51.0%")]
)
def test_what_may_be_another_on_another_processor_is_not(old: str, new: str) -> None:
    assert differences(LINE, LINE.replace(old, new), same_bits=True) == []


def test_hashes_of_another_processor_are_not_compared() -> None:
    other = LINE.replace("6fe0", "6fe1")
    assert differences(LINE, other, same_bits=False) == []
    assert differences(LINE, LINE.replace("6fe0e56cb1049d3d", "-"), same_bits=False) != []


def test_hashes_of_another_processor_are_equal_where_those_of_the_page_are() -> None:
    x, y, z = "6fe0e56cb1049d3d", "16e0e56cb1049d3d", "26e0e56cb1049d3d"
    assert differences(f"{x} {x} {y}", f"{y} {y} {z}", same_bits=False) == []
    assert differences(f"{x} {x} {y}", f"{y} {z} {x}", same_bits=False) != []
    assert differences(f"{x} {x} {y}", f"{y} {y} {y}", same_bits=False) != []


def test_the_collectives_of_another_processors_trace_are_compared() -> None:
    page = "phase  step\nforward  product y  9\nforward  all_reduce y  77,824  ~8\n"
    split = page.replace("product y  9", "product y, leaf 0  1\nforward  product y, leaf 1  8")
    assert differences(page, split, same_bits=False) == []
    assert differences(page, split.replace("77,824", "77,825"), same_bits=False) != []
    assert differences(page, split, same_bits=True) != []


def test_a_cell_runs_as_in_jupyter() -> None:
    cells = maker.cells_of(
        "# %% [markdown]\n# # Title\n# text\n\n# %%\nDEGREE = 2\n\n# %% fold\nprint(DEGREE)\n"
    )
    assert [cell.is_text for cell in cells] == [True, False, False]
    assert [cell.is_folded for cell in cells] == [False, False, True]
    assert cells[0].source == "# Title\ntext"
    assert [out.printed for out in maker.run(cells)] == ["", "2\n"]
    assert [out.printed for out in maker.run(cells, {"DEGREE": 3})] == ["", "3\n"]
