"""The exception tree: what a caller may rely on, and what the source may not do instead."""

import ast
import builtins
import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest

from shardproof import errors
from shardproof.errors import DegreeError, RankError, ShardproofError, UsageError
from shardproof.scheme import Scheme

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "shardproof"

# The builtin that a caller who does not know shardproof would catch.
BUILTINS = {
    "ShapeError": ValueError,
    "DegreeError": ValueError,
    "PlanError": ValueError,
    "LayoutError": ValueError,
    "UsageError": ValueError,
    "NumericsError": RuntimeError,
    "AxisError": RuntimeError,
    "MismatchError": RuntimeError,
    "CheckError": RuntimeError,
    "RankError": RuntimeError,
}

# Raised by our source although they are not ours: (file, what) and why.
FOREIGN_RAISES = {
    ("plan.py", "ImportError"): "caught beside what the import itself raises",
    ("plan.py", "ModuleNotFoundError"): "caught beside what the import itself raises",
    ("files.py", "ValueError"): "what json itself raises",
    ("safetensors_file.py", "OSError"): "what reading itself raises",
    ("segment.py", "OSError"): "caught beside what opening the memory itself raises",
    ("writing.py", "OSError"): "what writing itself raises",
    ("asking.py", "OSError"): "caught beside what the connection itself raises",
    ("presence.py", "OSError"): "caught beside what looking up an address itself raises",
    ("data_parallel_step.py", "StopIteration"): "what ends a loop",
    ("base.py", "AttributeError"): "what Python raises of what is not there",
    ("cut_module.py", "AttributeError"): "what Python raises of what is not there",
    ("output.py", "BrokenPipeError"): "what Python itself raises where nobody reads the output",
}


def own_classes() -> dict[str, type[ShardproofError]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return {name: cls for name, cls in found if cls is not ShardproofError}


def test_the_tree_is_the_one_written_here() -> None:
    assert set(own_classes()) == set(BUILTINS)


@pytest.mark.parametrize("name", BUILTINS)
def test_each_class_is_also_the_builtin_that_callers_expect(name: str) -> None:
    cls = own_classes()[name]
    assert issubclass(cls, ShardproofError)
    assert issubclass(cls, BUILTINS[name])
    assert not issubclass(ShardproofError, ValueError | RuntimeError)


def test_the_drawing_in_the_docstring_is_true() -> None:
    drawn = re.findall(r"[|`]-- (\w+)\s+\((\w+)\)", errors.__doc__ or "")
    assert dict(drawn) == {name: builtin.__name__ for name, builtin in BUILTINS.items()}


@pytest.mark.parametrize("name", BUILTINS)
def test_errors_travel_between_processes(name: str) -> None:
    error = own_classes()[name]("leaves=8: too few")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == "leaves=8: too few"


def test_rank_error_keeps_the_rank_that_is_to_blame() -> None:
    assert RankError("gone").rank is None
    error = pickle.loads(pickle.dumps(RankError("rank 2 of 3 was killed", rank=2)))
    assert (str(error), error.rank) == ("rank 2 of 3 was killed", 2)


def test_scheme_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UsageError, match=r"unknown numerics 'fast'.*invariant, native"):
        Scheme(numerics="fast")  # type: ignore[arg-type]
    with pytest.raises(DegreeError, match=r"leaves=0 is not a positive number"):
        Scheme(leaves=0)
    for leaves in (8.0, "8", True, None):
        with pytest.raises(UsageError, match=rf"leaves={leaves!r} is not a whole number"):
            Scheme(leaves=leaves)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"seed=0\.5 is not a whole number. Give an int"):
        Scheme(seed=0.5)  # type: ignore[arg-type]


# -- what the source may not do --------------------------------------------------------------------


def swallowed(path: Path) -> list[str]:
    """Handlers that make an error disappear: a bare `except`, or one that does nothing."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                found.append(f"{path.name}:{node.lineno} catches everything")
            if all(isinstance(line, ast.Pass) or is_ellipsis(line) for line in node.body):
                found.append(f"{path.name}:{node.lineno} drops an error")
    return found


def is_ellipsis(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and value.value is ...


def foreign_raises(path: Path) -> list[str]:
    """Builtin exceptions that are raised by name where one of ours would say more."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = raised.id if isinstance(raised, ast.Name) else ""
            is_builtin = inspect.isclass(getattr(builtins, name, None))
            if is_builtin and (path.name, name) not in FOREIGN_RAISES:
                found.append(f"{path.name}:{node.lineno} raises {name}")
    return found


def test_the_source_swallows_nothing() -> None:
    paths = sorted(SRC.rglob("*.py"))
    assert paths
    assert [found for path in paths for found in swallowed(path)] == []


def test_the_source_raises_its_own_classes() -> None:
    assert [found for path in sorted(SRC.rglob("*.py")) for found in foreign_raises(path)] == []


def test_every_exception_to_that_is_used() -> None:
    raised = {
        (path.name, name)
        for path in SRC.rglob("*.py")
        for name in re.findall(r"raise (\w+)", path.read_text())
    }
    assert set(FOREIGN_RAISES) <= raised
    assert all(FOREIGN_RAISES.values())


def test_planted_faults_are_found(tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text("try:\n    x = 1\nexcept ValueError:\n    pass\n")
    assert swallowed(path) == ["planted.py:3 drops an error"]
    path.write_text("try:\n    x = 1\nexcept:\n    x = 2\n")
    assert swallowed(path) == ["planted.py:3 catches everything"]
    path.write_text("raise ValueError('no')\n")
    assert foreign_raises(path) == ["planted.py:1 raises ValueError"]
    path.write_text("try:\n    x = 1\nexcept ValueError:\n    raise\n")
    assert swallowed(path) == foreign_raises(path) == []


# -- every class is met by a test ------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTINS)
def test_every_class_is_raised_by_the_source_and_matched_by_a_test(name: str) -> None:
    raised = rf"raise {name}\b|return {name}\(|: type\[\w+\] = {name}\b"
    assert any(re.search(raised, path.read_text()) for path in SRC.rglob("*.py"))
    matched = re.compile(rf"raises\(\s*(\w+\.)*{name}(,\s*match=|\) as \w+)")
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    assert any(matched.search(path.read_text()) for path in tests), f"no test matches a {name}"
