"""Judge every program in tests/check, and write docs/check-programs.md.

    python tests/check_table.py

It takes some minutes. The processes of the ranks start anew for each program, as a user's do.
"""

import ast
import sys
import time
from pathlib import Path

import pytest
import torch

from check_corpus import expected, judged, programs
from shardproof.checker.check_report import CheckReport

PAGE = Path(__file__).parents[1] / "docs" / "check-programs.md"

HEAD = """# The programs that `shardproof check` is tested on

Written by `python tests/check_table.py`, with torch {version}; the programs are in `tests/check/`.

- {num_right} right programs: {num_accused} accused.
- {num_wrong} wrong programs: {num_found} found, the first faulty module right in {num_modules},
  the kind of mistake right in {num_kinds}.
- One program took {median:.1f} s in the median and {longest:.1f} s at most, with the start of
  its ranks and the run in fp64."""


def sentence_of(path: Path) -> str:
    """What a program is, as its first line says."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def mark(is_right: bool, text: str) -> str:
    """A cell, which says if it is not what it should be."""
    return text if is_right else f"**{text}**"


def main() -> None:
    """Write the page."""
    reports: dict[Path, CheckReport] = {}
    seconds: list[float] = []
    for path in (*programs("right"), *programs("wrong")):
        start = time.perf_counter()
        try:
            reports[path] = judged(path)
        except pytest.skip.Exception as error:
            sys.exit(f"{path.stem}: {error}. Install it first, so that the page has all programs.")
        seconds.append(time.perf_counter() - start)
        sys.stderr.write(f"{path.stem}: {reports[path].verdict}\n")
    right = {path: reports[path] for path in programs("right")}
    wrong = {path: (expected(path), reports[path]) for path in programs("wrong")}
    lines = [
        HEAD.format(
            version=torch.__version__.partition("+")[0],
            num_right=len(right),
            num_accused=sum(not each.right for each in right.values()),
            num_wrong=len(wrong),
            num_found=sum(not each.right for _, each in wrong.values()),
            num_modules=sum(want.has_module(each) for want, each in wrong.values()),
            num_kinds=sum(want.kind == each.kind for want, each in wrong.values()),
            median=sorted(seconds)[len(seconds) // 2],
            longest=max(seconds),
        ),
        "\n## Right programs\n\n| program | what it is | verdict |\n|---|---|---|",
    ]
    for path, report in right.items():
        verdict = mark(report.right, "right" if report.right else "wrong")
        lines.append(f"| {path.stem.removeprefix('right_')} | {sentence_of(path)} | {verdict} |")
    lines.append(
        "\n## Wrong programs\n\nWhat is not as it should be is bold.\n\n"
        "| program | what is wrong | module | kind |\n|---|---|---|---|"
    )
    for path, (want, report) in wrong.items():
        module = mark(want.has_module(report), f"`{report.module or 'the model'}`")
        kind = mark(want.kind == report.kind, report.kind or "not named")
        stem = path.stem.removeprefix("wrong_")
        lines.append(f"| {stem} | {sentence_of(path)} | {module} | {kind} |")
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
