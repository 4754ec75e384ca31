"""What a reader is shown works: the blocks of README and docs run, and so do docstring examples.

How a block is marked: `python` and `console` run, `text` and unmarked blocks are only looked at.
A python block is a program of its own. In a console block, lines after `$ ` are commands of one
shell-like session in a folder with README.md and examples/: `shardproof` is run and must succeed,
`make` words must be in the Makefile, files that `python` and `torchrun` start must exist. Any other
command is an error here, for nobody would notice when it stops working.
A page of a lesson (`docs/lessons/NN_*.md`) is one program of many blocks, run by test_lessons.py.
So are `docs/any-model.md` and `docs/cut-your-model.md`, run by test_cut_pages.py.
"""

import doctest
import importlib
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "shardproof"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = ("git", "cd", "pip")  # they would leave this checkout
SECONDS = 280  # less than the time limit of a test, so that a failure shows the output
ONE_PROGRAM = re.compile(r"\d\d_|any-model|cut-your-model")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """Fenced blocks of a Markdown text; `line` is the first line inside the fence."""
    pattern = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
    return [
        Block(page, text[: found.start(2)].count("\n") + 1, found[1].strip(), found[2])
        for found in pattern.finditer(text)
    ]


def commands_of(block: Block) -> list[str]:
    joined = block.text.replace("\\\n", " ")
    return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


def run_python(block: Block, folder: Path) -> None:
    program = folder / "block.py"
    program.write_text(block.text)
    finish([sys.executable, str(program)], folder, {})


def run_console(block: Block, folder: Path) -> None:
    for name in ("README.md", "examples"):  # what commands in a checkout may read
        (folder / name).symlink_to(ROOT / name)
    for command in commands_of(block):
        words = shlex.split(command, comments=True)
        settings = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, settings[name] = words.pop(0).split("=", 1)
        if words[0] == "shardproof":
            run_shardproof(words[1:], folder, settings)
        else:
            check_unrun(words)


RAN: set[tuple[str, ...]] = set()  # commands that succeeded; two pages may show the same one
FILES = ("--json", "--html", "--against", "--plot")  # what a command does then depends on its page


def run_shardproof(words: list[str], folder: Path, settings: dict[str, str]) -> None:
    stands_alone = not settings and not any(each.startswith(FILES) for each in words)
    if stands_alone and tuple(words) in RAN:
        return
    command = Path(sys.executable).with_name("shardproof")
    finish([sys.executable, str(command), *words], folder, settings)
    if stands_alone:
        RAN.add(tuple(words))


def check_unrun(words: list[str]) -> None:
    """What can be said about a command without running it."""
    if words[0] == "make":
        unknown = {word for word in words[1:] if "=" not in word} - make_targets()
        assert not unknown, f"the Makefile has no word {unknown}"
    elif words[0] in ("python", "torchrun"):
        files = [word for word in words[1:] if word.endswith(".py")]
        if words[1] == "-m":  # a tool of this repository
            files.append(f"{words[2].replace('.', '/')}.py")
            if (ROOT / words[2].replace(".", "/")).is_dir():
                files[-1] = f"{words[2]}/__main__.py"
        assert files, f"{words} starts no file"
        assert all((ROOT / file).exists() for file in files), f"{files} do not exist"
    else:
        assert words[0] in NOT_RUN, f"nothing checks the command {words[0]!r}"


def finish(command: list[str], folder: Path, settings: dict[str, str]) -> None:
    source = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": source} | settings
    done = warm.run(command, cwd=folder, env=environment, timeout=SECONDS)
    assert done.returncode == 0, f"{command} exits {done.returncode}\n{done.stdout}{done.stderr}"


BLOCKS = [block for page in PAGES for block in blocks_of(page.name, page.read_text())]
EXAMPLES = sorted(
    path.relative_to(folder.parent)
    for folder in (SRC, ROOT / "benchmarks")
    for path in folder.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if b.language == "python" and not ONE_PROGRAM.match(b.page)],
    ids=str,
)
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    run_python(block, tmp_path)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "console"], ids=str)
def test_console_block_runs(block: Block, tmp_path: Path) -> None:
    assert commands_of(block), f"{block} has no command"
    run_console(block, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words_of_make_exist(page: Path) -> None:
    for block in blocks_of(page.name, page.read_text()):
        for line in block.text.splitlines():
            if re.match(r"(\$ )?make\b", line):
                check_unrun(shlex.split(line.removeprefix("$ "), comments=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fences_are_closed_and_languages_known(page: Path) -> None:
    text = page.read_text()
    blocks = blocks_of(page.name, text)
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks)
    assert {block.language for block in blocks} <= {"python", "console", "text", "json", "diff", ""}


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_docstring_examples_run(path: Path) -> None:
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    found = doctest.DocTestFinder().find(module)
    assert any(test.examples for test in found), "an example that no docstring shows"
    assert doctest.testmod(module).failed == 0


# -- the checker itself ----------------------------------------------------------------------------

PAGE = """Text
```python
{python}
```
```console
$ {command}
```
```text
$ nothing of this runs
```
"""


def page_with(python: str = "x = 1", command: str = "make test") -> list[Block]:
    return blocks_of("page.md", PAGE.format(python=python, command=command))


def test_blocks_are_found_with_their_lines() -> None:
    python, console, text = page_with()
    assert (str(python), python.language, python.text) == ("page.md:3", "python", "x = 1\n")
    assert (str(console), commands_of(console)) == ("page.md:6", ["make test"])
    assert text.language == "text"


def test_a_failing_python_block_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)exits 1\n.*1 is not 2"):
        run_python(page_with(python="assert 1 == 2, '1 is not 2'")[0], tmp_path)
    run_python(page_with()[0], tmp_path)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("make tset", "the Makefile has no word {'tset'}"),
        ("python examples/gone.py", "'examples/gone.py'.* do not exist"),
        ("frobnicate", "nothing checks the command 'frobnicate'"),
        ("shardproof frobnicate", "exits 2"),
    ],
)
def test_a_failing_console_block_is_found(tmp_path: Path, command: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        run_console(page_with(command=command)[1], tmp_path)
