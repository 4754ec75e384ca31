"""docs/optimizers.md tells of every optimizer of torch what was measured."""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shardproof.layers.step_guard import ELEMENTWISE, INSTEAD
from shardproof.optim import declare_elementwise

SCRIPT = Path(__file__).parents[1] / "docs" / "draw_optimizers.py"


@pytest.fixture
def drawing() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("draw_optimizers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_optimizers"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["draw_optimizers"]


def rows_of(drawing: ModuleType) -> dict[str, str]:
    """Class -> its line."""
    table = drawing.PAGE.read_text().split(drawing.BEGIN)[1].split(drawing.END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def test_the_page_has_every_optimizer_of_torch(drawing: ModuleType) -> None:
    """As it would be written for one that holds at every degree, or is refused."""
    rows = rows_of(drawing)
    assert list(rows) == drawing.classes() == sorted(drawing.FORMS)
    known = {name for _, name in ELEMENTWISE}
    for name, line in rows.items():
        held = drawing.Measured(same=drawing.DEGREES, off=0.0)
        is_taken = name in known or name in INSTEAD
        assert line == drawing.row(name, held if is_taken else drawing.Measured(refusal="no"))


@pytest.mark.parametrize("name", ["RAdam", "Muon", "Adafactor", "LBFGS", "SparseAdam"])
def test_the_page_says_what_is_measured(
    drawing: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(drawing, "STEPS", 1)
    measured = drawing.measure(name, degrees=(1, 3))
    line = drawing.row(name, measured)
    assert line.replace("1, 3", "1, 2, 3, 8") == rows_of(drawing)[name]
    assert bool(measured.refusal) == ("refused |  |" in line)


def test_other_bits_are_said_and_fail_the_command(
    drawing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's Muon, let through by a promise that it does not keep."""

    class Muon(torch.optim.Muon):
        pass

    declare_elementwise(Muon)
    monkeypatch.setattr(drawing, "STEPS", 1)
    measured = drawing.measure("Muon", degrees=(1, 2), kind=Muon)
    assert measured.same == (1,)
    assert not measured.holds
    line = drawing.row("Muon", measured)
    assert "| NOT PROVED |" in line
    assert "; not 2: 0.weight (defaults) | no |" in line
    page = tmp_path / "optimizers.md"
    shutil.copy(drawing.PAGE, page)
    before = page.read_text()
    monkeypatch.setattr(drawing, "PAGE", page)
    monkeypatch.setattr(drawing, "classes", lambda: ["Muon"])
    monkeypatch.setattr(drawing, "measure", lambda name: measured)
    with pytest.raises(SystemExit, match="1"):
        drawing.main()
    after = page.read_text()
    assert line in after
    assert after.split(drawing.BEGIN)[0] == before.split(drawing.BEGIN)[0]
    assert after.split(drawing.END)[1] == before.split(drawing.END)[1]
