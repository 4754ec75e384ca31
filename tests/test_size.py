"""Sizes of files and functions (300 and 40 lines are wanted, 500 and 60 the limit), and names."""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "shardproof"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILE_LINES = 500
FUNCTION_LINES = 60
PARAMETERS = 7

# Functions that have more, and why.
MANY_PARAMETERS = {
    **dict.fromkeys(
        [
            "cut/deferred.py _attended",
            "layers/attention.py forward",
            "cut/head_attention.py attended_with_dropout",
            "hf/attention_registry.py _attend",
            "numerics/channel_norms.py batch_norm",
            "numerics/channel_norms.py instance_norm",
            "numerics/whole_cross_entropy.py cross_entropy",
            "numerics/forms.py _batch_norm",
            "numerics/forms.py _instance_norm",
            "numerics/sdpa.py attention",
        ],
        "has the signature of a function of torch or transformers",
    ),
    **dict.fromkeys(
        ["optim/adafactor.py __init__", "optim/muon.py __init__"],
        "has the options of torch's optimizer",
    ),
    **dict.fromkeys(
        [
            "cli/generate.py generate",
            "cli/plan.py plan",
            "cli/prove.py prove",
            "cli/show.py show",
            "cli/train.py train",
        ],
        "is a command and its options",
    ),
    **dict.fromkeys(
        [
            "checker/check_program.py check",
            "checkpoint/save.py save",
            "prover/prove_model.py prove",
            "prover/proof.py prove_cases",
            "prover/proof.py prove_under_torchrun",
            "prover/rank_layouts.py prove_layouts",
            "ranks.py launch",
            "showing/show.py show",
        ],
        "is public, and its options are documented",
    ),
}


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
    paths = sorted(SRC.rglob("*.py"))
    assert paths
    paths += sorted(BENCHMARKS.rglob("*.py"))
    assert paths[-1].parent == BENCHMARKS
    assert [found for path in paths for found in too_long(path)] == []


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a function has, without self, cls and ctx."""
    names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def with_many_parameters(source: Path) -> list[str]:
    """Functions below a folder, but for constructors of layers."""
    found = []
    for path in sorted(source.rglob("*.py")):
        file = path.relative_to(source).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_constructor = node.name == "__init__" or node.name.startswith("from_")
            is_of_layer = file.startswith("layers/") and is_constructor
            if num_parameters(node) > PARAMETERS and not is_of_layer:
                found.append(f"{file} {node.name}")
    return found


def test_functions_have_few_parameters() -> None:
    assert sorted(set(with_many_parameters(SRC))) == sorted(MANY_PARAMETERS)


def test_a_planted_crowd_of_parameters_is_found(tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    names = ", ".join("abcdefgh")
    (tmp_path / "crowd.py").write_text(f"def crowd({names}): ...\n\ndef few(a, *, b): ...\n")
    layer = f"class A:\n    def __init__(self, {names}): ...\n    def f(self, {names}): ...\n"
    (tmp_path / "layers" / "a.py").write_text(layer)
    assert with_many_parameters(tmp_path) == ["crowd.py crowd", "layers/a.py f"]


def test_a_planted_giant_is_found(tmp_path: Path) -> None:
    path = tmp_path / "giant.py"
    path.write_text("def giant():\n" + "    x = 1\n" * FUNCTION_LINES)
    assert too_long(path) == ["giant.py:1 giant has 61 lines"]
    path.write_text("x = 1\n" * (FILE_LINES + 1))
    assert too_long(path) == ["giant.py has 501 lines"]
    path.write_text("def small():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))
    assert too_long(path) == []


# Names of classes and files that stand in several places, and why.
CLASSES: dict[str, str] = {
    "SharedInput": "the style of a plan (`sp.SharedInput`), and the layer that it makes",
}
FILES: dict[str, str] = {
    "attention.py": "the module, and the function that it calls",
    "check.py": "the command, and what checks collectives",
    "base.py": "the base classes of layers, and those of transports",
    "dropout.py": "the module, and the function that it calls",
    "embedding.py": "the module, and the function that it calls",
    "linear.py": "the module, and the function that it calls",
    "shared.py": "the module, and the function that it calls",
    "show.py": "the command, and the function that it calls",
    "sums.py": "sums over ranks, and sums of one rank",
    "threads.py": "the engine, and the transport between its ranks",
}


def repeated(src: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Names of classes and of files that stand in several places -> these places."""
    classes: dict[str, list[str]] = {}
    files: dict[str, list[str]] = {}
    for path in sorted(src.rglob("*.py")):
        where = path.relative_to(src).as_posix()
        if path.name != "__init__.py":
            files.setdefault(path.name, []).append(where)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(f"{where}:{node.lineno}")
    return (
        {name: places for name, places in classes.items() if len(places) > 1},
        {name: places for name, places in files.items() if len(places) > 1},
    )


def test_no_class_and_no_file_has_a_name_twice_without_need() -> None:
    classes, files = repeated(SRC)
    assert {name: places for name, places in classes.items() if name not in CLASSES} == {}
    assert {name: places for name, places in files.items() if name not in FILES} == {}


def test_every_name_that_is_allowed_twice_stands_twice() -> None:
    classes, files = repeated(SRC)
    for allowed, names in ((CLASSES, classes), (FILES, files)):
        assert all(allowed.values())
        gone = [name for name, why in allowed.items() if name not in names]
        assert gone == []


def test_a_planted_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "one.py").write_text("class Plan:\n    pass\n")
    (tmp_path / "room" / "one.py").write_text("x = 1\nclass Plan:\n    pass\n")
    assert repeated(tmp_path) == (
        {"Plan": ["one.py:1", "room/one.py:2"]},
        {"one.py": ["one.py", "room/one.py"]},
    )
