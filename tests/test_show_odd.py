"""What a person may give to `show` that is odd: shown as it is, or refused with one sentence."""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import shardproof as sp
from shardproof.axis import Axis
from shardproof.cli.main import main
from shardproof.errors import MismatchError, RankError, UsageError
from shardproof.showing.terminal import lines_of

CUT_OUTPUT = {"0": "colwise"}


def one_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": lambda y: (y * (1 + 0j)).sum()}, "the loss is"),
        ({"plan": {"0": "colwise_gather_output"}, "scheme": 5}, "scheme=5 is no Scheme"),
    ],
)
def test_a_loss_that_is_no_number_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"plan": CUT_OUTPUT, **options}
    with pytest.raises((UsageError, MismatchError, RankError), match=message):
        sp.show(one_linear(), torch.randn(2, 4), **given)


@pytest.mark.parametrize("options", [{}, {"loss": lambda y: (y**2).mean()}])
def test_a_loss_of_a_cut_output_is_that_of_the_whole(options: dict[str, Any]) -> None:
    shown = sp.show(one_linear(), torch.randn(2, 4), plan=CUT_OUTPUT, degree=2, **options)
    phases = [scene.phase for scene in shown.view.scenes if scene.arrows]
    assert "forward" in phases


def test_a_loss_that_adds_the_parts_is_right() -> None:
    x = torch.arange(8.0).view(2, 4)

    def build(axis: Axis) -> nn.Module:
        layer = sp.ColumnParallelLinear(4, 8, axis=axis)
        layer.register_forward_hook(lambda module, args, y: Lost(y, module, axis))
        return layer

    class Lost:
        def __init__(self, y: Tensor, module: Any, axis: Axis) -> None:
            zero = torch.zeros_like(y)
            self.loss = sp.functional.mse_loss(y, zero, axis=axis, cut=module.cut)

    step = sp.show(build, x, degree=2)
    assert next(scene.phase for scene in step.view.scenes if scene.arrows) == "forward"


def test_inputs_may_be_named_tuples_and_keys_must_be_strings() -> None:
    class Pair(NamedTuple):
        a: Tensor
        b: Tensor

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair: Pair) -> Tensor:
            result: Tensor = self.linear(pair.a + pair.b)
            return result

    plan = {"linear": "colwise_gather_output"}
    step = sp.show(Adds(), (Pair(torch.ones(1, 4), torch.ones(1, 4)),), plan=plan)
    assert step.view.scenes
    with pytest.raises(UsageError, match="inputs has the key 1"):
        sp.show(Adds(), {1: torch.ones(1, 4)}, plan=plan)


def test_pages_go_to_regular_files_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, message in ((pipe, "is no regular file"), ("x" * 5000, "cannot be written")):
        with pytest.raises(UsageError, match=message):
            sp.show(one_linear(), torch.ones(1, 4), plan=CUT_OUTPUT, html=path)


def test_page_and_data_want_two_files(tmp_path: Path) -> None:
    file = str(tmp_path / "a.html")
    words = ["show", "--case", "matmul-row", "--html", file, "--json", file]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "Name two files" in done.stderr


def test_names_do_not_steer_the_terminal_and_numbers_do_not_touch() -> None:
    whole = nn.Sequential()
    whole.add_module("\x1b[31mred", nn.Linear(4, 8))
    with torch.no_grad():
        whole[0].weight.mul_(1e-30)
    step = sp.show(whole, torch.ones(1, 4), plan={"\x1b[31mred": "colwise_gather_output"})
    assert "\x1b" not in str(step)
    lines = lines_of(step.view, values=True, width=80)
    numbers = [line.plain for line in lines if "e-3" in line.plain]
    assert numbers
    assert all(re.fullmatch(r"( +\S+)+", line) for line in numbers)


def test_complex_and_infinite_numbers_are_shown() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = (self.linear(x) * self.turn).abs() / torch.zeros(2)
            return result

    step = sp.show(Odd(), torch.ones(1, 4), plan={"linear": "colwise_gather_output"})
    assert "<table" in step.page()
    assert "1+0j" in step.page()
    json.dumps(step.as_dict(), allow_nan=False)
