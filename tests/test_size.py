"""One idea per file, one page per idea: 300 lines and 40 are wanted, 500 and 60 are the limit."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "src" / "shardproof", ROOT / "benchmarks")
FILE_LINES = 500
FUNCTION_LINES = 60


def too_long(path: Path) -> list[str]:
    """What in one file is over the limit; a function's docstring counts, its decorators do not."""
    text = path.read_text()
    lines = len(text.splitlines())
    found = [f"{path.name} has {lines} lines"] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{path.name}:{node.lineno} {node.name} has {length} lines")
    return found


def test_no_file_and_no_function_is_too_long() -> None:
    paths = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]
    assert {folder for folder in FOLDERS if any(folder in path.parents for path in paths)} == {
        *FOLDERS
    }
    assert [found for path in paths for found in too_long(path)] == []


def test_a_planted_giant_is_found(tmp_path: Path) -> None:
    path = tmp_path / "giant.py"
    path.write_text("def giant():\n" + "    x = 1\n" * FUNCTION_LINES)
    assert too_long(path) == ["giant.py:1 giant has 61 lines"]
    path.write_text("x = 1\n" * (FILE_LINES + 1))
    assert too_long(path) == ["giant.py has 501 lines"]
    path.write_text("def small():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))
    assert too_long(path) == []
