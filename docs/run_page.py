"""Runs a page that is one program of many blocks, and writes what each block prints below it.

The blocks of ```python on a page run in order and share their names. What a block prints stands in
the block of ```text that follows it. `python docs/run_page.py docs/cut-your-model.md` writes the
page anew; tests/test_cut_pages.py compares.
"""

import contextlib
import io
import linecache
import re
import sys
from pathlib import Path
from typing import Any

CODE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def printed(page: str) -> list[str]:
    """What each block of code prints, by the page."""
    return [found[2] or "" for found in CODE.finditer(page)]


def run(page: str, name: str) -> list[str]:
    """What each block of code of a page prints when it runs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    linecache.cache[name] = (len(page), None, page.splitlines(keepends=True), name)  # for messages
    outputs = []
    for found in CODE.finditer(page):
        line = page[: found.start(1)].count("\n")
        program = compile("\n" * line + found[1], name, "exec")
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            exec(program, names)
        outputs.append(written.getvalue())
    return outputs


def filled(page: str, outputs: list[str]) -> str:
    """The page with these outputs below its blocks."""
    rest = iter(outputs)

    def block(found: re.Match[str]) -> str:
        output = next(rest)
        shown = f"\n```text\n{output}```\n" if output else ""
        return f"```python\n{found[1]}```\n{shown}"

    return CODE.sub(block, page)


if __name__ == "__main__":
    for each in map(Path, sys.argv[1:]):
        text = each.read_text(encoding="utf-8")
        each.write_text(filled(text, run(text, each.name)), encoding="utf-8")
