"""The way from a layer to its collective stays short enough to be read.

Files that are called and return before the transport is reached are not counted.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "reading_path.py"
FRAMES, FILES, LINES = 7, 8, 900


@pytest.fixture(scope="module")
def reading_path() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("reading_path", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reading_path"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reading_path"]


def test_few_frames_lie_between_a_layer_and_the_transport(reading_path: ModuleType) -> None:
    for name, steps in reading_path.paths().items():
        files = reading_path.lines_of(steps)
        assert 3 <= len(steps) <= FRAMES, name
        assert len(files) <= FILES, name
        assert sum(files.values()) <= LINES, name
        assert steps[-1].file.startswith("comm/"), name


def test_a_longer_way_is_seen(reading_path: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardproof.comm import split, started  # noqa: PLC0415

    names = {"started": started}
    source = "def detour(*given):\n    return started.start_planned(*given)\n"
    exec(compile(source, str(started.__file__), "exec"), names)
    monkeypatch.setattr(split, "start_planned", names["detour"])
    before = len(reading_path.path_of(reading_path.row_forward))
    monkeypatch.undo()
    assert before == len(reading_path.path_of(reading_path.row_forward)) + 1
