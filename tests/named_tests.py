"""Tables of Markdown pages whose rows name tests."""

import ast
import functools
from pathlib import Path

TESTS = Path(__file__).parent


@functools.cache
def names_in(file: str) -> set[str]:
    """Names of the test functions of one file, on their own or in a class."""
    path = TESTS / f"{file}.py"
    if not path.is_file():
        return set()
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def rows_of(page: str, head: str) -> list[list[str]]:
    """The cells of every row of every table, without the tables' heads."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line != head and set(line) - set("|-")
    ]


def named_in(cell: str) -> list[str]:
    """The tests that the last cell of a row names."""
    return [name.strip("` ") for name in cell.split(",")]


def missing_in(cell: str) -> str | None:
    """The first name in the last cell of a row that is no test, or None."""
    for name in named_in(cell):
        file, _, test = name.partition("::")
        if test not in names_in(file):
            return name
    return None
