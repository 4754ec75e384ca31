"""Writes the lessons: from each `docs/lessons/NN_name.py` a notebook and a page, with outputs.

    python docs/make_lessons.py            all of them
    python docs/make_lessons.py 01 03      those that begin so

A source is a program in percent format: `# %%` begins a cell of code, `# %% [markdown]` one of
text; the page folds the code of a cell that begins with `# %% fold`, which makes a picture or a
table. The notebook is run by Jupyter, from its first cell to its last; the page has the same cells
and what they printed. Pictures of the page are files in `docs/lessons/pictures`.
Needs nbclient and ipykernel (the extra `dev`).
"""

import argparse
import contextlib
import io
import os
import re
import sys
from ast import Expr, Expression, Module, parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("lessons")
PICTURES = "pictures"
FOLDED = "<details><summary>code</summary>\n\n{}\n\n</details>"
KIND = re.compile(r"^# %%( \[markdown\]| fold)?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """One cell of a source: text or code."""

    is_text: bool
    source: str
    is_folded: bool = False


@dataclass(frozen=True)
class Output:
    """What one cell of code printed, and the picture that it showed, if any."""

    printed: str
    picture: Any = None  # of lessons/pictures.py: has `svg` and `words`


def sources(only: Sequence[str] = ()) -> list[Path]:
    """The sources of all lessons, or of those whose names begin with one of `only`."""
    found = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not only or path.name.startswith(tuple(only))]


def cells_of(program: str) -> list[Cell]:
    """The cells of a percent program; what stands before the first mark is a comment on it."""
    marks = list(KIND.finditer(program))
    ends = [mark.start() for mark in marks[1:]] + [len(program)]
    cells = []
    for mark, end in zip(marks, ends, strict=True):
        body = program[mark.end() : end].strip("\n")
        is_text = mark[1] == " [markdown]"
        source = _uncommented(body) if is_text else body
        cells.append(Cell(is_text, source, is_folded=mark[1] == " fold"))
    return cells


def _uncommented(body: str) -> str:
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())


def run(cells: Sequence[Cell], settings: Mapping[str, Any] | None = None) -> list[Output]:
    """Run a lesson in this process, as Jupyter would.

    Args:
        cells: of the lesson.
        settings: names to set after every cell that sets them: another DEGREE.
    Returns:
        One output for each cell of code.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    with _importable(FOLDER):
        return [_run(cell.source, names, settings or {}) for cell in cells if not cell.is_text]


def _run(source: str, names: dict[str, Any], settings: Mapping[str, Any]) -> Output:
    tree, shown = parse(source), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for statement in tree.body:
            exec(compile(Module([statement], []), "lesson", "exec"), names)
            names.update({name: value for name, value in settings.items() if name in names})
        if last is not None:
            shown = eval(compile(Expression(last.value), "lesson", "eval"), names)
    return Output(out.getvalue(), shown if hasattr(shown, "svg") else None)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lessons import what lies beside them, as they do in Jupyter."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def notebook_of(cells: Sequence[Cell]) -> Any:
    """The notebook of a lesson, not yet run."""
    import nbformat  # noqa: PLC0415 - of the extra `dev`; tests read sources without it

    made = [
        nbformat.v4.new_markdown_cell(cell.source)
        if cell.is_text
        else nbformat.v4.new_code_cell(cell.source)
        for cell in cells
    ]
    return nbformat.v4.new_notebook(cells=made)


def outputs_of(notebook: Any, picture: Callable[[str, str], Any]) -> list[Output]:
    """What the code cells of a notebook that was run printed and showed.

    Args:
        notebook: as nbformat or json reads it.
        picture: makes one from its SVG and its words.
    """
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed, shown = "", None
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                printed += "".join(output["text"])
            elif "image/svg+xml" in output.get("data", {}):
                words = "".join(output["data"]["text/plain"]).removeprefix("Picture: ")
                shown = picture("".join(output["data"]["image/svg+xml"]), words)
        found.append(Output(printed, shown))
    return found


def page_of(cells: Sequence[Cell], outputs: Sequence[Output], name: str) -> str:
    """The page of a lesson; its pictures are files beside it."""
    parts, remaining = [], iter(outputs)
    count = 0
    for cell in cells:
        if cell.is_text:
            parts.append(cell.source)
            continue
        code = f"```python\n{cell.source}\n```"
        parts.append(FOLDED.format(code) if cell.is_folded else code)
        output = next(remaining)
        if output.printed:
            parts.append(f"```text\n{output.printed.rstrip()}\n```")
        if output.picture is not None:
            count += 1
            parts.append(f"![{output.picture.words}]({PICTURES}/{name[:2]}-{count}.svg)")
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Drawn:
    """A picture as a notebook has it."""

    svg: str
    words: str


def make(source: Path) -> None:
    """Run one lesson in Jupyter and write its notebook, its page and its pictures."""
    import nbformat  # noqa: PLC0415
    from execute_notebook import execute  # noqa: PLC0415 - needs nbclient

    cells = cells_of(source.read_text(encoding="utf-8"))
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook_of(cells), target)
    with contextlib.chdir(FOLDER):
        execute(target, target)
    outputs = outputs_of(nbformat.read(target, as_version=4), Drawn)
    pictures = [output.picture for output in outputs if output.picture is not None]
    for old in (FOLDER / PICTURES).glob(f"{source.name[:2]}-*.svg"):
        old.unlink()
    for count, drawn in enumerate(pictures, start=1):
        path = FOLDER / PICTURES / f"{source.name[:2]}-{count}.svg"
        path.write_text(drawn.svg.rstrip() + "\n", encoding="utf-8")
    page = page_of(cells, outputs, source.stem)
    source.with_suffix(".md").write_text(page, encoding="utf-8")


def main() -> None:
    """Make all lessons, or some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help="how the names of those begin: 01 03")
    options = parser.parse_args()
    (FOLDER / PICTURES).mkdir(exist_ok=True)
    os.environ.pop("COLUMNS", None)
    for source in sources(options.only):
        make(source)
        sys.stdout.write(f"{source.stem}\n")


if __name__ == "__main__":
    main()
