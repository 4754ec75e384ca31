"""`sp.check` and `shardproof check`: their answers, reports and errors, and faults of their own."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import shardproof as sp
import warm
from check_corpus import FOLDER, judged
from shardproof.checker import in_outputs, judging, layout, placement
from shardproof.checker.mistake_kinds import KINDS
from shardproof.checker.placement import NONE, PARTIAL, REPLICATE, SHARD, matched, place
from shardproof.cli.main import main

RIGHT = FOLDER / "right_handwritten_transformer.py"
WRONG = FOLDER / "wrong_bias_before_the_sum_down.py"


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(main, ["check", *map(str, arguments)])


def error_of(*arguments: object) -> str:
    """The one line of a command that refuses."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


# The command ------------------------------------------------------------------------------------


def test_a_right_program_exits_with_0() -> None:
    result = run(RIGHT)
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().splitlines()
    assert lines[-1].startswith("Right at degree 2: every difference from the plain module is")
    assert any("layers.0.mlp.down.weight" in line and "Shard(1)" in line for line in lines)


def test_a_wrong_program_exits_with_1_and_says_where_and_what(tmp_path: Path) -> None:
    result = run(WRONG, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert result.exit_code == 1, result.output
    lines = result.stdout.strip().splitlines()
    assert lines[-1].startswith("Wrong at degree 2, in the forward of layers.0.mlp.down")
    assert "bias on every rank" in lines[-1]
    assert any("down: Linear   <-- here" in line for line in lines)
    assert any(f"{WRONG}:" in line for line in lines), "file and line of the forward"
    assert sum("and should be" in line for line in lines) == 2
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["right"], found["module"], found["kind"]) == (
        False, "layers.0.mlp.down", "bias on every rank",
    )  # fmt: skip
    assert found["verdict"] == lines[-1]
    wrong = [each for each in found["tensors"] if each["verdict"] == "wrong"]
    assert wrong[0]["name"] == "output of layers.0.mlp.down"
    assert wrong[0]["in_fp64"] > 1e-3
    page = (tmp_path / "r.html").read_text()
    assert lines[-1].split(";")[0] in page
    assert "http" not in page.split("<main>")[1].replace("http://www.w3.org", "")


def test_another_degree(tmp_path: Path) -> None:
    assert run(RIGHT, "--degree", 4).exit_code == 0
    result = run(WRONG, "--degree", 3)
    assert result.exit_code == 1
    assert "Wrong at degree 3" in result.stdout
    assert "2 times layers.0.mlp.down.bias more" in " ".join(result.stdout.split())


def test_under_torchrun_each_rank_answers_alike() -> None:
    for path, code in ((RIGHT, 0), (WRONG, 1)):
        command = [sys.executable, "-m", "shardproof", "check", str(path)]
        started = warm.start_ranks(command, ranks=2)
        outputs = [process.communicate(timeout=240.0) for process in started]
        assert [process.returncode for process in started] == [code] * 2, outputs
        assert outputs[0][0].strip().splitlines()[-1].startswith("Wrong" if code else "Right")
        assert outputs[1][0] == ""


# Errors -----------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_asked(tmp_path: Path) -> None:
    missing = tmp_path / "missing.py"
    assert f"there is no file {missing}" in error_of(missing)
    half = tmp_path / "half.py"
    half.write_text("def parallel(group):\n    return None\n")
    assert f"{half} has no reference and no batch. It needs" in error_of(half)
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    assert "cannot be loaded: ModuleNotFoundError" in error_of(broken)
    assert "--degree 'x' is not a whole number" in error_of(RIGHT, "--degree", "x")
    assert "degree=1 has no ranks to compare" in error_of(RIGHT, "--degree", 1)


def plain() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


BATCH = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_functions_that_do_not_fit() -> None:
    with pytest.raises(sp.errors.UsageError, match=r"parallel='x' is not callable"):
        sp.check("x", plain, BATCH)  # type: ignore[arg-type]
    with pytest.raises(sp.errors.UsageError, match="reference returned 3, and"):
        sp.check(lambda group: plain(), lambda: 3, BATCH)  # type: ignore[arg-type, return-value]
    with pytest.raises(sp.errors.UsageError, match="a tensor of one element is needed"):
        sp.check(lambda group: plain(), plain, BATCH, lambda output: output)
    with pytest.raises(sp.errors.UsageError, match="steps"):
        sp.check(lambda group: plain(), plain, BATCH, steps=0)
    with pytest.raises(sp.errors.UsageError, match="unknown engine 'gpus'"):
        sp.check(lambda group: plain(), plain, BATCH, engine="gpus")


def test_an_error_of_a_rank_names_it() -> None:
    def parallel(group: Any) -> nn.Module:
        if group.rank() == 1:
            raise ValueError("no such layer")
        return plain()

    with pytest.raises(sp.errors.RankError, match=r"rank 1[\s\S]*no such layer"):
        sp.check(parallel, plain, BATCH)


# What it can judge ------------------------------------------------------------------------------


def test_a_model_that_shardproof_cut_on_threads() -> None:
    built = plain()

    def parallel(axis: sp.Axis) -> nn.Module:
        return sp.parallelize(copy.deepcopy(built), {"0": "colwise", "2": "rowwise"}, axis)

    report = sp.check(parallel, lambda: copy.deepcopy(built), BATCH, engine="threads", degree=3)
    assert report.right, report.verdict
    assert {each.name: each.placement for each in report.layouts}["2.weight"] == "Shard(1)"


def test_a_batch_may_be_a_dict_and_the_loss_may_take_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.linear(x) * scale

    def loss(output: Tensor, batch: dict[str, Any]) -> Tensor:
        return (output * batch["scale"]).sum()

    def reference() -> nn.Module:
        return Scaled()

    batch = {"x": BATCH, "scale": 3.0}
    report = sp.check(lambda group: Scaled(), reference, batch, loss, optimizer=torch.optim.AdamW)
    assert report.right, report.verdict


class OffBy(nn.Module):
    """A linear layer whose output is off by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


@pytest.mark.parametrize("factor", [1 + 1e-6, 1 + 1e-9])
def test_a_mistake_below_the_rounding_of_fp32_is_found(factor: float) -> None:
    report = sp.check(lambda group: OffBy(factor), lambda: OffBy(1.0), BATCH)
    assert (report.right, report.module, report.kind) == (False, "", None)
    assert report.phase == "forward"


class BiasLater(nn.Module):
    """Two linear layers; the bias of the second may be added outside of it."""

    def __init__(self, *, later: bool, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.last = OffBy(factor)
        self.last.inner = nn.Linear(4, 4)
        self.later = later

    def forward(self, x: Tensor) -> Tensor:
        if not self.later:
            return self.last(self.inside(x))
        bias = self.second.bias
        self.second.register_parameter("bias", None)
        y = self.second(self.first(x))
        self.second.register_parameter("bias", bias)
        return self.last(y + bias)

    def inside(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_work_may_be_divided_among_modules_otherwise() -> None:
    """As in Megatron's layers, which return their bias."""
    report = sp.check(lambda group: BiasLater(later=True), lambda: BiasLater(later=False), BATCH)
    assert report.right, report.verdict
    assert report.marks()["second"] == "inside"


def test_parameters_of_other_names() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(nn.functional.gelu(self.first(x)))

    report = sp.check(lambda group: Renamed(), plain, BATCH)
    assert report.right, report.verdict
    wholes = {each.name: each.whole for each in report.layouts}
    assert wholes == {
        "first.weight": "0.weight", "first.bias": "0.bias",
        "second.weight": "2.weight", "second.bias": "2.bias",
    }  # fmt: skip


class Inside(nn.Module):
    """A module around another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_module_around_all_others_is_looked_through(factor: float) -> None:
    report = sp.check(
        lambda group: Inside(Inside(nn.Sequential(OffBy(factor), nn.Linear(4, 4)))),
        lambda: nn.Sequential(OffBy(1.0), nn.Linear(4, 4)),
        BATCH,
    )
    assert report.right == (factor == 1.0), report.verdict
    assert report.module == (None if report.right else "0")
    assert {each.name for each in report.layouts} == {
        "0.inner.weight", "0.inner.bias", "1.weight", "1.bias",
    }  # fmt: skip
    assert report.note == ""


class Owned(nn.Module):
    """A sum of two layers, of which each rank has one."""

    def __init__(self, only: int | None = None, factor: float = 1.0) -> None:
        super().__init__()
        layers = [nn.Linear(6, 4), nn.Linear(6, 4)]
        kept = range(2) if only is None else (only,)
        self.layers = nn.ModuleDict({str(i): layers[i] for i in kept})
        self.is_cut, self.factor = only is not None, factor

    def forward(self, x: Tensor) -> Tensor:
        part = sum(layer(x) for layer in self.layers.values())
        if not self.is_cut:
            return part  # type: ignore[return-value]
        whole = part.detach().clone()
        torch.distributed.all_reduce(whole)
        return part * self.factor + (whole - part.detach() * self.factor)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_parameters_that_one_rank_has_are_compared_there(factor: float) -> None:
    report = sp.check(lambda group: Owned(group.rank(), factor), Owned, BATCH)
    assert report.right == (factor == 1.0), report.verdict
    held = {each.name: each.held for each in report.layouts}
    assert held["layers.1.weight"] == ("none", "all")
    if not report.right:
        assert (report.module, report.kind) == ("layers.1", "sum made twice")


def test_parameters_that_are_not_found_are_said() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.Linear(6, 4)
            self.halved = nn.Parameter(inner.weight.detach() / 2)
            self.bias = nn.Parameter(inner.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, 2 * self.halved, self.bias)

    class Plain(nn.Linear):
        pass

    report = sp.check(lambda group: Doubled(), lambda: Plain(6, 4), BATCH, optimizer=still)
    assert report.right, report.verdict
    assert "not compared for halved" in report.note
    assert "the plain module's weight was not found" in report.note


def still(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer that changes nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


class Normed(nn.Module):
    """A layer before a batch norm, whose small gradients AdamW makes large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.relu_(self.first(x))))


def test_rounding_that_adamw_enlarges_is_rounding() -> None:
    """In the order of its sums the program differs from the plain module, and in nothing else."""

    class Reversed(Normed):
        def forward(self, x: Tensor) -> Tensor:
            order = torch.arange(5, -1, -1)
            first = x[:, order] @ self.first.weight[:, order].T + self.first.bias
            return self.last(self.norm(torch.relu(first)))

    for seed in range(3):
        batch = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
        report = sp.check(
            lambda group: Reversed(), Normed, batch, optimizer=torch.optim.AdamW, steps=3
        )
        assert report.right, report.verdict


class OnlySingle(nn.Module):
    """A module that refuses fp64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("fp32 alone")
        return self.inner(x)


def test_without_fp64_the_last_bits_are_moved() -> None:
    report = sp.check(lambda group: OnlySingle(OffBy(1.0)), lambda: OnlySingle(OffBy(1.0)), BATCH)
    assert report.right, report.verdict
    assert report.precision == "fp32 and moved last bits"
    assert "the program does not run in fp64: TypeError: fp32 alone" in report.note
    report = sp.check(lambda group: OnlySingle(OffBy(1.01)), lambda: OnlySingle(OffBy(1.0)), BATCH)
    assert (report.right, report.module) == (False, "inner")


def test_a_report_is_plain_data() -> None:
    report = judged(WRONG)
    assert json.loads(json.dumps(report.as_dict()))["degree"] == 2
    assert report.kind in KINDS
    assert all((report.meaning, report.way_out, report.evidence))
    assert report.marks()["layers.0.mlp.down"] == "wrong"


# How tensors lie --------------------------------------------------------------------------------

WHOLE = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("parts", "kind", "dim"),
    [
        ([WHOLE, WHOLE], REPLICATE, None),
        ([WHOLE[:, :3], WHOLE[:, 3:]], SHARD, 1),
        ([WHOLE[:1], WHOLE[1:]], SHARD, 0),
        ([WHOLE[:0], WHOLE], SHARD, 0),
        ([WHOLE[:, 3:], WHOLE[:, :3]], SHARD, 1),
        ([WHOLE[:, ::2], WHOLE[:, 1::2]], SHARD, 1),
        ([WHOLE[:2], WHOLE[2:], WHOLE[:2], WHOLE[2:]], SHARD, 0),
        ([0.25 * WHOLE, 0.75 * WHOLE], PARTIAL, None),
        ([WHOLE, 2 * WHOLE], NONE, None),
        ([WHOLE[:, :3], WHOLE[:, :3]], NONE, None),
        ([WHOLE.flatten()[:12], WHOLE.flatten()[12:]], SHARD, 0),
        ([WHOLE.flatten()[:11], WHOLE.flatten()[11:23]], NONE, None),
    ],
)
def test_placements(parts: list[Tensor], kind: str, dim: int | None) -> None:
    found = place([part.clone() for part in parts], WHOLE, 1e-12)
    assert found.kind == kind
    if kind == SHARD:
        assert found.dim == dim
        assert found.covers


def test_slices_that_are_alike_are_taken_in_turn() -> None:
    whole = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    assert matched(whole[1:4], whole, 0, 0.0) == (1, 2, 3)
    assert matched(whole[[4, 0]], whole, 0, 0.0) == (4, 0)
    assert matched(torch.tensor([7.0]), whole, 0, 0.0) is None


# Faults of the checker itself -------------------------------------------------------------------


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return monkeypatch.setattr


def test_a_wrong_slice_in_the_search_of_layouts_is_found(plant: Callable[..., None]) -> None:
    """The corpus would say so: a right program is accused."""

    def off_by_one(*arguments: Any) -> tuple[int, ...] | None:
        found = matched(*arguments)
        return found if found is None or 0 in found else tuple(each - 1 for each in found)

    plant(layout, "matched", off_by_one)
    assert not judged(RIGHT).right


def test_a_verdict_that_never_fires_is_found(plant: Callable[..., None]) -> None:
    """The corpus would say so: a wrong program passes, or another module is named."""
    plant(judging.Judge, "_is_right", lambda *_: True)
    plant(placement, "NONE", REPLICATE)
    plant(judging, "NONE", "never")
    assert judged(WRONG).right


def test_parts_that_are_taken_for_the_whole_are_found(plant: Callable[..., None]) -> None:
    """The corpus would say so: a right program is accused, or a missing sum passes."""
    plant(placement, "_partial", lambda *_: None)
    report = judged(FOLDER / "wrong_no_sum_after_embedding.py")
    assert report.kind != "sum missing"


def test_a_test_of_a_kind_that_fails_is_said_and_hides_nothing(plant: Callable[..., None]) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a shape that nobody thought of")

    plant(in_outputs, "bias_too_often", broken)
    report = judged(WRONG)
    assert (report.right, report.module) == (False, "layers.0.mlp.down")
    assert "the test for broken failed: RuntimeError: a shape that nobody thought of" in report.note
