"""`sp.show` and `shardproof show`: scenes are complete, and all three renderings say the same."""

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import shardproof as sp
from shardproof.cli.main import main
from shardproof.engines.engine import Ranks
from shardproof.errors import DegreeError, PlanError, UsageError
from shardproof.prover.cases import all_cases, find_case
from shardproof.scheme import Scheme
from shardproof.showing.page import page_of
from shardproof.showing.scenes import StepView, view_of
from shardproof.showing.show import ShownStep
from shardproof.showing.step_runs import (
    MOST_WITH_VALUES,
    TracedStep,
    case_work,
    run_on_rank,
    traced,
)
from shardproof.showing.tensors import RankPart, grids_of, owners_of, tensor_of, writer_of
from shardproof.showing.terminal import lines_of
from shardproof.trace.step import Part

SEED = 12345
SMALL = ("matmul-row", "matmul-column", "ffn", "linear-row", "mlp-gathered", "attention", "digits")


def run_case(name: str, degree: int) -> TracedStep:
    work = case_work(find_case(name), scheme=Scheme(seed=SEED), seed=SEED)
    return traced(work, degree=degree, engine="threads", values=True)


@pytest.fixture(scope="module")
def ffn() -> TracedStep:
    return run_case("ffn", 3)


@pytest.fixture(scope="module")
def view(ffn: TracedStep) -> StepView:
    return view_of(ffn.trace, title="ffn", about=("A step.",))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.up, self.act, self.down = nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.act(self.up(x)))
        return y


PLAN = {"up": sp.ColumnParallel(), "down": sp.RowParallel()}


@pytest.fixture(scope="module")
def block() -> ShownStep:
    x = torch.arange(18.0).reshape(3, 6).sin().requires_grad_()
    return sp.show(Block(), x, degree=2, plan=PLAN, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def lies_in(part: Part, whole: Part) -> bool:
    """Whether the numbers of a step are among those of what is drawn, along its cut dim."""
    if (part.dim, part.size, len(part.shape)) != (whole.dim, whole.size, len(whole.shape)):
        return False
    if part.values is None or whole.values is None:
        return (part.corner or part.values) is not None and whole.corner is not None
    ours, theirs = torch.tensor(part.values), torch.tensor(whole.values)
    if part.dim is not None and part.held and whole.held and part.held != whole.held:
        theirs = theirs.narrow(part.dim, part.held[0] - whole.held[0], part.held[1] - part.held[0])
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


def misses(traced_step: TracedStep, view: StepView) -> list[str]:
    """What of a trace is in no scene, and what of the scenes is not in the trace."""
    in_scenes = [
        (step.rank, step.number)
        for scene in view.scenes
        for action in scene.actions
        if action
        for step in action.steps
    ]
    traced_steps = [(step.rank, step.number) for steps in traced_step.trace.ranks for step in steps]
    found = [f"{each} is in {in_scenes.count(each)} scenes" for each in traced_steps
             if in_scenes.count(each) != 1]  # fmt: skip
    found += [f"{each} is not in the trace" for each in in_scenes if each not in traced_steps]
    for scene in view.scenes:
        actions = [action for action in scene.actions if action]
        meetings = {action.first.meeting for action in actions}
        if scene.is_collective and (len(meetings) != 1 or len(actions) != view.degree):
            found.append(f"scene {scene.number}: the ranks do not meet")
        for step in (step for action in actions for step in action.steps):
            drawn = [p.part for tensor in scene.tensors for p in tensor.pieces
                     if p.rank == step.rank]  # fmt: skip
            read = (*step.inputs, *((step.output,) if step.output else ()))
            found += [f"scene {scene.number} lacks {part.name}" for part in read
                      if not any(lies_in(part, other) for other in drawn)]  # fmt: skip
    for rank, counts in enumerate(traced_step.counts):
        tensors = [each for kinds in counts.values() for each in kinds.values()]
        sent = sum(a.num_bytes for s in view.scenes for a in s.arrows if a.sender == rank)
        sent += sum(s.actions[rank].first.sent_bytes for s in view.scenes
                    if "The transport decides" in " ".join(s.sentences))  # fmt: skip
        if sent != sum(each["sent_bytes"] for each in tensors):
            found.append(f"rank {rank}: arrows have {sent} bytes")
    return found


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_every_step_of_every_rank_is_in_one_scene_and_bytes_are_the_ledgers(
    name: str, degree: int
) -> None:
    found = run_case(name, degree)
    view = view_of(found.trace, title=name)
    assert misses(found, view) == []
    phases = list(dict.fromkeys(scene.phase for scene in view.scenes))
    assert phases == ["forward", "backward", "update"][: 2 if name.startswith("matmul") else 3]
    for rank in range(degree):
        assert found.trace.collectives(rank) == found.counts[rank]
    assert any(scene.arrows for scene in view.scenes) == (degree > 1)


def test_a_step_that_a_scene_loses_is_noticed(ffn: TracedStep, view: StepView) -> None:
    scenes = tuple(scene for scene in view.scenes if not scene.arrows)
    lost = dataclasses.replace(view, scenes=scenes)
    found = misses(ffn, lost)
    assert any("0 scenes" in each for each in found)
    assert any("arrows have 0 bytes" in each for each in found)


def test_processes_show_the_same_numbers(pool: Callable[[int, str], Ranks]) -> None:
    work = case_work(find_case("ffn"), scheme=Scheme(seed=SEED), seed=SEED)
    trace = sp.Trace(values=True)
    runs = pool(2, "processes").run(partial(run_on_rank, work=work, num_values=1024))
    trace.take((run.steps, run.num_dropped) for run in runs)
    other, view = (view_of(each, title="ffn") for each in (trace, run_case("ffn", 2).trace))
    assert [scene.tensors for scene in other.scenes] == [scene.tensors for scene in view.scenes]
    assert [scene.arrows for scene in other.scenes] == [scene.arrows for scene in view.scenes]


def test_a_feed_forward_sends_one_sum_each_way(view: StepView) -> None:
    met = [scene for scene in view.scenes if scene.is_collective]
    assert [(scene.phase, scene.title) for scene in met] == [
        ("forward", "down: all_reduce"),
        ("backward", "up: all_reduce"),
    ]
    first = met[0]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    for stage in (1, 2):
        found = [(a.sender, a.receiver) for a in first.arrows if a.stage == stage]
        assert found == pairs
    assert first.formula == "y = (leaves 0-1 + (leaf 2 + leaf 3)) + (leaves 4-5 + leaves 6-7)"
    assert "A leaf is one of the 8 parts" in " ".join(first.sentences)
    assert [tensor.placement for tensor in first.tensors] == ["Partial", "Replicate"]
    assert "The ranks add up their summands" in " ".join(first.sentences)
    assert [piece.rank for piece in first.tensors[0].pieces] == [0, 0, 1, 1, 2]


def test_values_are_those_of_the_plain_module(block: ShownStep) -> None:
    plain, x = Block(), torch.arange(18.0).reshape(3, 6).sin().requires_grad_()
    plain(x).square().mean().backward()
    (made,) = [
        scene.tensors[-1]
        for scene in block.view.scenes
        if scene.phase == "backward" and scene.title == "up: product"
        and scene.tensors[-1].name == "grad_weight"
    ]  # fmt: skip
    whole = torch.cat([torch.tensor(piece.part.values) for piece in made.pieces])
    torch.testing.assert_close(whole, plain.up.weight.grad)
    assert made.shape == (10, 6)


class Cells(HTMLParser):
    """The cells of matrices, scene by scene, as the page has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scenes: list[list[str]] = []
        self.tags: list[str] = []
        self._is_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        kind = dict(attrs).get("class") or ""
        if tag == "section":
            self.scenes.append([])
        self._is_cell = tag == "td" and bool(re.match(r"all|r\d", kind))
        if self._is_cell:
            self.scenes[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.scenes[-1][-1] += data


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, list | tuple):
        return [number for each in tree for number in numbers(each)]
    return [float(tree)]


def test_the_page_and_the_json_have_the_numbers_of_the_trace(block: ShownStep) -> None:
    cells = Cells()
    cells.feed(block.page())
    scenes = json.loads(json.dumps(block.as_dict()))["scenes"]
    assert len(cells.scenes) == len(scenes) == len(block.view.scenes) > 10
    for drawn, written, scene in zip(cells.scenes, scenes, block.view.scenes, strict=True):
        expected = [
            cell
            for tensor in scene.tensors
            for grid in grids_of(
                tensor, most_rows=6 if scene.is_collective else 12, most_columns=20
            )
            for row in grid.cells
            for cell in row
        ]
        assert drawn == expected
        for tensor, as_json in zip(scene.tensors, written["figures"], strict=True):
            exact = [numbers(piece.part.values) for piece in tensor.pieces]
            assert [numbers(piece["values"]) for piece in as_json["pieces"]] == exact
            shown_cells = [
                float(cell)
                for grid in grids_of(tensor, most_rows=99, most_columns=99)
                for row in grid.cells
                for cell in row
            ]
            parts = exact[:1] if tensor.is_alike else exact
            known = sorted(number for part in parts for number in part)
            # At least three digits of the largest number are written.
            largest = max(abs(number) for number in known)
            assert sorted(shown_cells) == pytest.approx(known, abs=0.006 * largest)


def test_ranks_that_must_have_the_same_and_have_not_are_shown_apart() -> None:
    parts = [Part("y", (2,), "float32", "Replicate", values=(1.0, x)) for x in (2.0, 2.5)]
    tensor = tensor_of([RankPart(rank, part) for rank, part in enumerate(parts)], is_result=True)
    assert tensor.is_broken
    assert [grid.label for grid in grids_of(tensor, most_rows=4, most_columns=4)] == [
        "rank 0",
        "rank 1",
    ]
    same = tensor_of([RankPart(rank, parts[0]) for rank in range(2)], is_result=True)
    assert not same.is_broken


def test_an_uneven_cut_is_drawn_with_the_indices_of_the_whole() -> None:
    held = [(0, 3), (3, 6), (6, 8)]
    pieces = [
        RankPart(
            rank,
            Part("w", (2, stop - start), "float32", "Shard(1)", 1, (start, stop), 8,
                 values=tuple(tuple(float(10 * row + column) for column in range(start, stop))
                              for row in range(2))),
        )
        for rank, (start, stop) in enumerate(held)
    ]  # fmt: skip
    tensor = tensor_of(pieces, is_result=False)
    (grid,) = grids_of(tensor, most_rows=9, most_columns=99)
    assert tensor.shape == (2, 8)
    assert [(line.head, line.owner) for line in grid.columns] == [
        ("0", 0), ("1", 0), ("2", 0), ("3", 1), ("4", 1), ("5", 1), ("6", 2), ("7", 2),
    ]  # fmt: skip
    assert grid.cells[1] == ("10", "11", "12", "13", "14", "15", "16", "17")
    assert owners_of(tensor, rows=1, columns=8) == [[0, 0, 0, 1, 1, 1, 2, 2]]
    without = tensor_of(pieces[:2], is_result=False)
    assert owners_of(without, rows=1, columns=4) == [[0, 0, 1, None]]
    (part,) = grids_of(tensor, most_rows=9, most_columns=6)
    assert part.is_part is False  # a gap of one would take as much room


def test_a_large_matrix_is_shown_in_part() -> None:
    found = run_case("linear-row", 2)
    view = view_of(found.trace, title="x")
    weight = next(f for f in view.scenes[0].tensors if f.name == "weight")
    assert weight.shape == (608, 1024)
    assert weight.pieces[0].part.values is None
    (grid,) = grids_of(weight, most_rows=12, most_columns=20)
    assert grid.is_part
    assert len(grid.rows) <= 9
    assert grid.cells[0][0] not in ("", "...")
    assert grid.columns[-2].head == "514", "the second rank's part begins at 512"


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("degree", [2, 8])
def test_lines_fit_and_are_ascii(width: int, degree: int) -> None:
    view = view_of(run_case("matmul-column", degree).trace, title="x")
    lines = lines_of(view, values=True, width=width)
    assert max(line.cell_len for line in lines) <= width
    assert all(line.plain.isascii() for line in lines)
    text = "\n".join(line.plain for line in lines)
    weight = next(f for f in view.scenes[0].tensors if f.name == "weight")
    for grid in grids_of(weight, most_rows=6, most_columns=8):
        for row in grid.cells:
            assert all(cell in text.split() for cell in row)


def test_a_long_name_does_not_widen_the_lines() -> None:
    model = nn.Sequential()
    model.add_module("a_name_without_any_blank_" * 8, nn.Linear(4, 4))
    model.add_module("row", nn.Linear(4, 4))
    plan = {"a_name*": sp.ColumnParallel(), "row": sp.RowParallel()}
    view = sp.show(model, torch.ones(1, 4), plan=plan).view
    assert max(line.cell_len for line in lines_of(view, values=True, width=60)) <= 60


def test_a_view_says_what_it_leaves_out(ffn: TracedStep) -> None:
    view = view_of(ffn.trace, title="x", most_scenes=4)
    assert len(view.scenes) == 4
    assert sum(view.num_left_out.values()) == len(view_of(ffn.trace, title="x").scenes) - 4
    sentence = "From step 5 on, steps are left out: 7 backward, 2 update."
    assert view.omissions == (sentence,)
    assert sentence in page_of(view)
    assert "steps are left out" in " ".join(
        line.plain for line in lines_of(view, values=False, width=80)
    )


def test_what_a_user_calls_things_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>&\"'"
    model = nn.Sequential()
    model.add_module("<b>up", nn.Linear(4, 4))
    model.add_module("down</script>", nn.Linear(4, 4))
    plan = {"<b>up": sp.ColumnParallel(), "down</script>": sp.RowParallel()}
    page = sp.show(model, torch.ones(1, 4), plan=plan, name=evil).page()
    cells = Cells()
    cells.feed(page)
    assert "img" not in cells.tags
    assert "b" not in cells.tags
    assert page.count("</script>") == cells.tags.count("script") == 1
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "down&lt;/script&gt;: product" in page


def test_a_page_needs_nothing_else(block: ShownStep, tmp_path: Path) -> None:
    page = block.page()
    assert re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", page) == []
    assert "://" not in page.replace("http://www.w3.org", "")
    block.save(tmp_path / "step.html")
    assert (tmp_path / "step.html").read_text(encoding="utf-8") == page
    frame = block._repr_html_()
    assert "srcdoc=" in frame
    assert "<script>" not in frame


def test_the_callers_model_and_inputs_stay_as_they_were(block: ShownStep) -> None:
    model, x = Block(), torch.ones(2, 6, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sp.show(model, x, plan=PLAN, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_of_an_input_is_summed_only_if_it_is_wanted() -> None:
    def sums(x: torch.Tensor) -> list[str]:
        view = sp.show(Block(), x, plan=PLAN).view
        return [f"{scene.phase} {scene.title}" for scene in view.scenes if scene.is_collective]

    assert sums(torch.ones(2, 6)) == ["forward down: all_reduce"]
    wanted = ["forward down: all_reduce", "backward up: all_reduce"]
    assert sums(torch.ones(2, 6, requires_grad=True)) == wanted


def test_a_function_of_an_axis_and_a_loss_are_taken() -> None:
    def build(axis: sp.Axis) -> nn.Module:
        return sp.parallelize(Block(), PLAN, axis)

    step = sp.show(
        build, (torch.ones(2, 6),), degree=3, loss=nn.functional.mse_loss, target=torch.ones(2, 4)
    )
    assert step.view.title == "build at degree 3"
    assert "mse_loss" in " ".join(scene.title for scene in step.view.scenes)
    assert str(step).startswith("== build at degree 3")


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"model": 3}, UsageError, "cannot show 3: it is neither a module"),
        ({"plan": None}, PlanError, "plan"),
        ({"plan": {"upp": sp.ColumnParallel()}}, PlanError, "upp"),
        ({"degree": 9}, DegreeError, "degree 9 exceeds leaves=8"),
        ({"degree": 0}, DegreeError, "degree"),
        ({"inputs": 5}, UsageError, "inputs=5 are no inputs of a model"),
        ({"loss": 1}, UsageError, "loss=1 cannot be called"),
        ({"target": torch.ones(1)}, UsageError, "target is given, and there is no loss"),
        ({"optimizer": "sgd"}, UsageError, "optimizer='sgd' cannot be called"),
        ({"optimizer": lambda p: 1}, UsageError, "what the function optimizer returned"),
        ({"loss": lambda y: y}, UsageError, "a step needs one number"),
        ({"values": 2}, UsageError, "values"),
        ({"engine": "gpu"}, UsageError, "unknown engine 'gpu'"),
        ({"html": "/no/such/folder/x.html"}, UsageError, "there is no directory"),
        ({"html": "/"}, UsageError, "is a directory"),
        ({"html": 5}, UsageError, "not a path"),
        ({"model": Block, "plan": PLAN}, UsageError, "plan= is for a module"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    given: dict[str, Any], kind: type[Exception], words: str
) -> None:
    arguments = {"model": Block(), "inputs": torch.ones(2, 6), "plan": PLAN, **given}
    with pytest.raises(kind, match=re.escape(words)):
        sp.show(arguments.pop("model"), arguments.pop("inputs"), **arguments)


def command(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["show", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_writes_and_exits_with_0(tmp_path: Path) -> None:
    page, data = tmp_path / "a.html", tmp_path / "a.json"
    code, out, err = command(
        "--case", "mlp-gathered", "--degree", "3", "--html", str(page), "--json", str(data)
    )
    assert (code, err) == (0, "")
    assert out.startswith("== case mlp-gathered at degree 3\n")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.index("== forward") < out.index("== backward") < out.index("== update")
    assert "rank 0 ==> ranks 1 and 2: " in out
    written = json.loads(data.read_text())
    assert written["degree"] == 3
    assert page.read_text().count('<section class="scene') == len(written["scenes"])
    for scene in written["scenes"]:
        assert f"{scene['number']:>3}. {scene['title']}" in out


def test_numbers_are_printed_if_they_are_asked_for() -> None:
    plain, with_values = (
        command("--case", "matmul-row"),
        command("--case", "matmul-row", "--values"),
    )
    assert plain[0] == with_values[0] == 0
    assert " 24 " not in plain[1]
    assert re.search(r"0 +0 +8 +16 +24\n", with_values[1]), "the first row of the weight"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--case NAME or --model DIR is missing"),
        (("--case", "ffn", "--model", "x"), "were both given"),
        (("--case", "fnn"), "Near names: ffn"),
        (("--case", "ffn", "--degree", "9"), "degree 9 exceeds leaves=8"),
        (("--case", "ffn", "--degree", "two"), "--degree 'two' is not a whole number"),
        (("--case", "ffn", "--engine", "thread"), "Did you mean threads?"),
        (("--case", "ffn", "--scenes", "0"), "--scenes 0 is not a positive number"),
        (("--case", "ffn", "--html", "/no/such/x.html"), "--html /no/such/x.html: there is no"),
        (("--case", "ffn", "--json", "/"), "--json / is a directory"),
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--wrong",), "no such option"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def config(folder: Path, **sizes: int) -> str:
    pytest.importorskip("transformers", reason="needs the extra hf")
    known = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16, **sizes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(known))
    return str(folder)


def test_a_model_of_a_directory_is_shown(tmp_path: Path) -> None:
    code, out, err = command("--model", config(tmp_path), "--values")
    assert (code, err) == (0, "")
    assert out.startswith("== LlamaForCausalLM at degree 2\n")
    assert "The directory has no weights: this run takes random weights." in " ".join(out.split())
    assert "model.layers.0.mlp.down_proj: all_reduce" in out
    assert "lm_head.weight: update" in out


def test_a_model_that_is_too_large_is_refused_before_it_is_made(tmp_path: Path) -> None:
    large = config(tmp_path, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2)
    code, out, err = command("--model", large, "--values")
    assert (code, out) == (2, "")
    assert f"take at most {MOST_WITH_VALUES:,}" in err
    for option in ("--html", "--json"):
        code, out, err = command("--model", large, option, str(tmp_path / "x"))
        assert (code, out) == (2, "")
        assert f"take at most {MOST_WITH_VALUES:,}" in err
    larger = config(tmp_path, hidden_size=8192, intermediate_size=8192, num_hidden_layers=2)
    code, _, err = command("--model", larger)
    assert code == 2
    assert "use shardproof plan" in err


def test_every_case_can_be_shown() -> None:
    for case in all_cases():
        if case.is_installed and case.name not in SMALL:
            found = run_case(case.name, 2)
            assert misses(found, view_of(found.trace, title=case.name, most_scenes=999)) == []


def test_the_program_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "show.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/show.md", "exec"), {})
    assert (tmp_path / "step.html").read_text().startswith("<!doctype html>")
    assert "2: all_reduce" in capsys.readouterr().out


def test_the_output_in_the_documentation_is_that_of_the_command() -> None:
    text = (Path(__file__).parents[1] / "docs" / "show.md").read_text()
    (printed,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert printed in command("--case", "ffn", "--degree", "2")[1]


def told_of(title: str, view: StepView, phase: str) -> str:
    (scene,) = [s for s in view.scenes if s.title == title and s.phase == phase]
    return " ".join((scene.formula, *scene.sentences))


def test_sentences_say_what_each_rank_takes_and_who_has_nothing() -> None:
    view = view_of(run_case("mlp-gathered", 3).trace, title="x")
    product = told_of("output_layer: product", view, "forward")
    assert "multiplies the whole x by its own rows of weight, and adds its own" in product
    assert "Rank 2 holds no rows of weight, no elements of bias and no columns of y." in product
    scenes = [scene for scene in view.scenes if scene.title == "output_layer: product"]
    backward = " ".join(scenes[1].sentences)
    assert "its own columns of grad_y; nothing is sent (backward of the all_gather)" in backward
    assert "Rank 2 does nothing in this step: it holds no leaf." in backward
    assert "divides its gradient by the same number, here 64." in told_of("div", view, "backward")
    loss = next(s for s in view.scenes if s.title == "mse_loss: loss" and s.phase == "backward")
    assert [tensor.name for tensor in loss.tensors] == ["y", "target", "grad_y"]
    assert "w = w - 0.01 * grad (SGD)" in told_of("output_layer.bias: update", view, "update")
    gathers = [s for s in view.scenes if s.title == "output_layer: all_gather"]
    assert [[f.name for f in s.tensors] for s in gathers] == [["x", "x"], ["y", "y"]]
    row = view_of(run_case("linear-row", 2).trace, title="x")
    (gather,) = [s for s in row.scenes if s.title.endswith("all_gather")]
    assert [tensor.name for tensor in gather.tensors] == ["grad_x", "grad_x"]


def test_the_loss_that_was_taken_is_named(block: ShownStep) -> None:
    class WithLoss(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(loss=x.square().mean())

    assert "No loss was given: this run takes the mean of the squares" in " ".join(block.view.about)
    own = sp.show(lambda axis: WithLoss(), torch.ones(2, 2, requires_grad=True))
    assert "this run takes the loss that the model returns" in " ".join(own.view.about)
    assert "squares" not in " ".join(own.view.about)


def test_maps_beyond_the_limit_are_counted_and_zero_has_no_sign() -> None:
    out = command("--case", "attention", "--degree", "2")[1]
    assert "7 more tensors of the forward are not drawn here." in out
    part = Part("x", (2,), "float32", values=(-1.0e-9, 12.5))
    assert writer_of([part]).number(-1.0e-9) == "0.0"
    assert "1:5 index 5, which rank 1 holds" in command("--case", "matmul-row", "--values")[1]


def test_of_many_ranks_the_page_sums_up_what_each_sends_and_lists_each_arrow() -> None:
    page = page_of(view_of(run_case("ffn", 8).trace, title="x"))
    assert "<li>rank 0 to ranks 1-7: to each its slice of leaf 0, 172 bytes in all</li>" in page
    assert page.count("<summary>Each arrow</summary>") == 2
    assert page.count("<li>rank 0 to rank 1: elements 7-13 of leaf 0, 28 bytes</li>") == 2
    assert "Each arrow" not in page_of(view_of(run_case("ffn", 4).trace, title="x"))


def test_the_data_alone_has_the_numbers_and_the_terminal_does_not(tmp_path: Path) -> None:
    data = tmp_path / "a.json"
    code, out, _ = command("--case", "matmul-row", "--json", str(data))
    assert code == 0
    assert " 24 " not in out
    pieces = [
        piece
        for scene in json.loads(data.read_text())["scenes"]
        for tensor in scene["figures"]
        for piece in tensor["pieces"]
    ]
    assert pieces
    assert all(piece["values"] is not None for piece in pieces)
