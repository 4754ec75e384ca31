"""The gallery of mistakes: each is made, named by the prover, and shown as the page says."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drawn import script
from shardproof.cli.break_ import plot
from shardproof.cli.main import main
from shardproof.errors import UsageError
from shardproof.mistakes import Edit, Mistake, all_mistakes, find_mistake
from shardproof.mistakes.edit import planted
from shardproof.mistakes.mistake import BITS, TORCH, SetUp
from shardproof.mistakes.outcome import Outcome, is_found, make
from shardproof.ops import linear
from shardproof.prover.proof import prove_cases
from shardproof.prover.report import Report

NUMBER = re.compile(r"(?<![\w#])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
SETUPS = tuple({mistake.setup.name: mistake.setup for mistake in all_mistakes()}.values())


def named(value: Mistake | SetUp) -> str:
    return value.name


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    return script("draw_mistakes")


@pytest.fixture(scope="module")
def outcomes(drawing: ModuleType) -> dict[str, Outcome]:
    """Every mistake, made once for all tests of this file."""
    made: dict[str, Outcome] = drawing.all_outcomes()
    return made


@pytest.fixture(scope="module")
def controls() -> dict[str, Report]:
    """Every set-up without a mistake."""
    return {setup.name: prove_cases([setup.case()], degrees=(1, 2, 3)) for setup in SETUPS}


def test_names_are_words_and_none_is_twice() -> None:
    names = [mistake.name for mistake in all_mistakes()]
    assert len(names) == len(set(names)) >= 20
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", name) for name in names)


@pytest.mark.parametrize("setup", SETUPS, ids=named)
def test_without_a_mistake_every_setup_is_proved(setup: SetUp, controls: dict[str, Report]) -> None:
    assert controls[setup.name].proved, controls[setup.name].verdict()


@pytest.mark.parametrize("mistake", all_mistakes(), ids=named)
def test_the_prover_names_the_mistake(
    mistake: Mistake, outcomes: dict[str, Outcome], controls: dict[str, Report]
) -> None:
    outcome = outcomes[mistake.name]
    assert outcome.report is not None, outcome.error
    assert outcome.is_named, outcome.verdict
    assert bool(outcome.stopped) == mistake.stops, outcome.stopped
    assert len(outcome.wrong) == len(outcome.right)
    assert not is_found(controls[mistake.setup.name], mistake.finding, in_full=False)


HIDDEN = [mistake for mistake in all_mistakes() if mistake.hidden_at]


@pytest.mark.parametrize("mistake", HIDDEN, ids=named)
def test_what_hides_at_some_degrees_is_proved_there(mistake: Mistake) -> None:
    with mistake.planted():
        report = prove_cases([mistake.setup.case()], degrees=mistake.hidden_at)
    assert report.proved, report.verdict()


def test_a_mistake_is_not_taken_for_another_one(outcomes: dict[str, Outcome]) -> None:
    """Whoever makes another mistake in the same set-up is told so, unless it says the same."""
    for outcome in outcomes.values():
        for other in all_mistakes():
            if other.setup is outcome.mistake.setup and other.finding != outcome.mistake.finding:
                assert outcome.report is not None
                is_same = is_found(outcome.report, other.finding)
                assert not is_same, (outcome.mistake.name, other.name)


def test_every_part_of_a_finding_is_compared(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["clipped-by-own-norm"]
    assert outcome.report is not None
    finding = outcome.mistake.finding
    assert is_found(outcome.report, finding)
    for changes in (
        {"tensor": "loss"},
        {"what": TORCH},
        {"degrees": (1, 3)},
        {"says": "rank 2 has not"},
        {"agrees": True},
    ):
        assert not is_found(outcome.report, dataclasses.replace(finding, **changes)), changes
    memory = outcomes["whole-weight-gathered"]
    assert memory.report is not None
    larger = dataclasses.replace(memory.mistake.finding, tensor="[96, 12]")
    assert not is_found(memory.report, larger)
    assert not is_found(memory.report, dataclasses.replace(finding, what=BITS))


def test_the_case_itself_counts_the_reduce_scatter(outcomes: dict[str, Outcome]) -> None:
    case = outcomes["partial-gradient-taken-for-whole"].case
    assert case is not None
    assert not case.checks_passed


def test_losses_end_where_the_page_says(drawing: ModuleType, outcomes: dict[str, Outcome]) -> None:
    """A mistake that changes nothing but rounding does not end below the right loss."""
    made = list(outcomes.values())
    halved = [each for each in made if each.wrong[-1] < each.wrong[0] / 2]
    below = [each for each in made if each.wrong[-1] < each.right[-1] - 0.01 * each.right[-1]]
    said = (
        f"In {len(halved)} of these {len(made)} trainings the wrong loss ends below half of where "
        f"it began. In {len(below)} it ends below the right loss."
    )
    assert said in drawing.PAGE.read_text()


def test_places_where_a_mistake_was_seen_can_be_looked_up() -> None:
    """A number of an issue or a pull request, a notebook, or a project and what it does."""
    for mistake in all_mistakes():
        if mistake.sighting:
            place = r"\((PR|issue) \d+\)|notebook 000|Megatron-LM's _reduce|fairscale"
            assert re.search(place, mistake.sighting), mistake.name


def test_the_right_code_is_back_after_a_mistake() -> None:
    mistake = find_mistake("row-bias-on-every-rank")
    before = linear._row.__code__

    def fail() -> None:
        with mistake.planted():
            assert linear._row.__code__ is not before
            raise ValueError("raised inside")

    with pytest.raises(ValueError, match="raised inside"):
        fail()
    assert linear._row.__code__ is before


def two_negations(y: int) -> int:
    y = -y
    y = -y
    return y


@pytest.mark.parametrize(("right", "times"), [("y = nothing_like_it()", 0), ("y = -y", 2)])
def test_lines_that_do_not_stand_there_once_are_an_error(right: str, times: int) -> None:
    said = rf"two_negations: .* stand there {times} times, and must once: .* up to date"
    with pytest.raises(UsageError, match=said), planted([Edit(two_negations, right, "pass")]):
        pass


def test_a_method_that_calls_super_can_be_edited() -> None:
    class Base:
        def answer(self) -> int:
            return 1

    class Derived(Base):
        def answer(self) -> int:
            return super().answer() + 1

    with planted([Edit(Derived.answer, "return super().answer() + 1", "return super().answer()")]):
        assert Derived().answer() == 1
    assert Derived().answer() == 2


def test_what_is_no_plain_function_cannot_be_edited() -> None:
    with pytest.raises(UsageError, match="is no plain function"), planted([Edit(len, "a", "b")]):
        pass


def test_a_change_that_changes_nothing_is_not_named() -> None:
    mistake = find_mistake("row-bias-on-every-rank")
    same = dataclasses.replace(mistake.edit, wrong=mistake.edit.right)
    assert not make(dataclasses.replace(mistake, edit=same), steps=2).is_named


def test_other_degrees_than_those_of_the_gallery() -> None:
    mistake = find_mistake("row-bias-on-every-rank")
    assert make(mistake, (1, 3), steps=2).is_named
    added = make(mistake, (2,), steps=2)
    assert added.degrees == (1, 2)
    assert added.is_named
    alone = make(mistake, (1,), steps=2)
    assert alone.degrees == (1,)
    assert not alone.is_named
    assert alone.report is not None
    assert alone.report.proved


@pytest.mark.parametrize("name", ["weight-not-transposed", "whole-weight-gathered"])
def test_what_one_degree_shows_needs_no_other(name: str) -> None:
    outcome = make(find_mistake(name), (2,), steps=2)
    assert outcome.degrees == (2,)
    assert outcome.is_named


def test_the_verdict_is_whole_and_without_notes(outcomes: dict[str, Outcome]) -> None:
    for outcome in outcomes.values():
        assert outcome.report is not None
        assert outcome.verdict.endswith(").") or outcome.verdict[-2].isdigit(), outcome.verdict
        assert outcome.report.verdict().startswith(outcome.verdict)
    assert any(each.report.verdict() != each.verdict for each in outcomes.values() if each.report)


# The command.

Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["break", *words])
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return run


def test_the_command_shows_a_mistake(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, _ = run("row-bias-on-every-rank", "--json", str(file))
    assert code == 0
    assert "right | return y if bias is None else products.add_bias(y, bias, split)" in out
    assert "wrong | y = comm.all_reduce(rows @ weight.T + bias, split.axis, dir" in out
    assert re.search(r"first tensor that differs: output, by up to 0\.\d+\n", out)
    assert "The prover says: Not proved: in case block, tensor output is the first whose" in out
    assert out.endswith("finds the mistake at degrees 1 and 2, as docs/mistakes.md says.\n")
    assert "was added" not in out
    found = json.loads(file.read_text())
    assert found["named"] is True
    assert found["first_tensor"] == "output"
    assert 0.1 < found["max_abs_diff"] < 1
    assert len(found["losses"]["right"]) == len(found["losses"]["wrong"]) == 16
    assert found["report"]["proved"] is False
    source = Path(found["file"])
    text = (Path(linear.__file__).parents[2] / source).read_text().splitlines()
    assert text[found["line"] - 1].strip() == found["right"].splitlines()[0]


def test_the_command_says_no_where_nothing_shows(run: Run) -> None:
    code, out, _ = run("sum-in-rank-order", "--degrees", "1,2")
    assert code == 1
    assert "by no more than rounding" not in out
    assert out.endswith(
        "Not named: nothing shows at degrees 1 and 2. It shows when degrees 1, 2 and 3 are run.\n"
    )


def test_the_command_adds_degree_1_and_says_so(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, _ = run("row-bias-on-every-rank", "--degrees", "2", "--json", str(file))
    assert code == 0
    assert "Degree 1 was added: one degree alone shows no difference of bits.\n" in out
    assert out.endswith("at degrees 1 and 2, as docs/mistakes.md says.\n")
    assert json.loads(file.read_text())["degrees"] == [1, 2]


def test_the_command_says_no_where_the_shapes_do_not_fit(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, _ = run("rows-dealt-out", "--degrees", "1,5", "--json", str(file))
    assert code == 1
    found = json.loads(file.read_text())
    assert (found["report"], found["named"]) == (None, False)
    assert "rank" in found["verdict"]
    assert "none was compared, for a rank raised an error" in out
    assert "something else came of it" in out


def test_what_the_command_says_when_the_ranks_would_stop(run: Run) -> None:
    code, out, _ = run("ranks-read-different-batches")
    assert code == 0
    assert "Outside of the prover the ranks stop: the ranks disagree about the input of 'up'" in out


def test_the_list_has_all(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    code, out, _ = run("--list", "--json", str(file))
    assert code == 0
    assert [name for name in map(named, all_mistakes()) if name not in out] == []
    chapters = json.loads(file.read_text())["chapters"]
    listed = [each["name"] for chapter in chapters for each in chapter["mistakes"]]
    assert listed == [mistake.name for mistake in all_mistakes()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("row-bias",), "there is no mistake 'row-bias'. Near names: row-bias-on-every-rank"),
        ((), "needs the name of a mistake, such as row-bias-on-every-rank"),
        (
            ("same-shard-on-every-rank", "--list"),
            "--list takes no name, got 'same-shard-on-every-rank'",
        ),
        (("same-shard-on-every-rank", "--degrees", "1,9"), "degree 9"),
        (("same-shard-on-every-rank", "--degrees", "a"), "'a' is not a degree"),
        (("same-shard-on-every-rank", "--json", "/nowhere/a.json"), "there is no directory"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: tuple[str, ...], said: str, run: Run
) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_the_command_is_refused_under_torchrun(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("same-shard-on-every-rank")
    assert code == 2
    assert "cannot run under torchrun" in err


def test_a_plot_has_every_step() -> None:
    lines = plot([4.0, 2.0, 0.0], [4.0, 3.0, math.nan])
    assert lines[0] == "4 |*"
    assert lines[-1] == "0 |      o"
    assert sum(line.count("x") for line in lines) == 1
    assert plot([4.0, 1.0], [1e9, -2.0])[0] == " 8 |x"
    assert plot([4.0, 1.0], [1e9, -2.0])[-1] == "-2 |   x"


# The page.


def is_same(one: str, other: str) -> bool:
    """True if two texts differ in nothing but numbers, and in these by what processors may."""
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.03, abs_tol=2e-3) for a, b in pairs)


def test_the_page_is_what_the_command_writes(
    drawing: ModuleType, outcomes: dict[str, Outcome]
) -> None:
    page = drawing.PAGE.read_text().split(drawing.BEGIN)[1].split(drawing.END)[0]
    written = drawing.written(outcomes)
    assert is_same(page.strip(), written.strip()), "run python docs/draw_mistakes.py"
    assert not is_same(page, page.replace("0.448", "0.548"))
    assert not is_same(page, page.replace("output", "loss"))


@pytest.mark.parametrize("mistake", all_mistakes(), ids=named)
def test_the_picture_is_what_the_command_draws(
    mistake: Mistake, drawing: ModuleType, outcomes: dict[str, Outcome]
) -> None:
    drawn = drawing.picture(outcomes[mistake.name])
    kept = (drawing.PICTURES / f"{mistake.name}.svg").read_text()
    if mistake.finding.agrees:  # which bits rounding changes, the processor decides
        drawn, kept = (each.replace(drawing.ROUNDED, drawing.RIGHT) for each in (drawn, kept))
    assert is_same(kept, drawn), "run python docs/draw_mistakes.py"


def test_a_picture_has_a_dark_colour_for_every_light_one(
    drawing: ModuleType, outcomes: dict[str, Outcome]
) -> None:
    drawn = drawing.picture(outcomes["row-bias-on-every-rank"])
    elements, sheets = re.sub(r"<style>.*?</style>", "", drawn), drawing.colours()
    light, dark = sheets.split("@media(prefers-color-scheme:dark)")
    for name in {*drawing.FILLS, *drawing.STROKES}:
        assert f"{name}{{" in light
        assert f"{name}{{" in dark
    assert not re.search(r"(fill|stroke)=", elements)
    own = {name.split(".")[-1] for name in (*drawing.FILLS, *drawing.STROKES)}
    used = {
        each for classes in re.findall(r'class="([^"]+)"', elements) for each in classes.split()
    }
    assert used - own == {"page", "label", "bold", "end"}


def test_there_is_a_picture_of_every_mistake_and_no_other(drawing: ModuleType) -> None:
    kept = {path.stem for path in drawing.PICTURES.glob("*.svg")}
    assert kept == {mistake.name for mistake in all_mistakes()}


def test_an_unnamed_mistake_fails_the_drawing(
    drawing: ModuleType,
    outcomes: dict[str, Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    page = tmp_path / "mistakes.md"
    page.write_text(f"before {drawing.BEGIN}old{drawing.END} after")
    first = outcomes["row-bias-on-every-rank"]
    other = dataclasses.replace(
        first.mistake, finding=outcomes["same-shard-on-every-rank"].mistake.finding
    )
    changed = {**outcomes, "row-bias-on-every-rank": dataclasses.replace(first, mistake=other)}
    monkeypatch.setattr(drawing, "PAGE", page)
    monkeypatch.setattr(drawing, "PICTURES", tmp_path / "mistakes")
    monkeypatch.setattr(drawing, "all_outcomes", lambda: outcomes)
    drawing.main()
    assert page.read_text().startswith("before ")
    assert page.read_text().endswith(" after")
    assert len(list((tmp_path / "mistakes").glob("*.svg"))) == len(outcomes)
    monkeypatch.setattr(drawing, "all_outcomes", lambda: changed)
    with pytest.raises(SystemExit, match="1"):
        drawing.main()


def test_nothing_is_left_behind(outcomes: dict[str, Outcome]) -> None:
    """After all mistakes, every function has its own code: nothing is compiled from a change."""
    for mistake in all_mistakes():
        assert not mistake.edit.plain.__code__.co_filename.startswith("<")
