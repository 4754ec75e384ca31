"""`shardproof break`: make a mistake on purpose, and see what it does and what the prover says."""

import math
from collections.abc import Sequence
from typing import Any

import click
from rich.text import Text

from shardproof.cli.options import HELP_OPTIONS, Degrees, json_option, refuse_torchrun
from shardproof.cli.output import BAD, GOOD, WIDE, PlainConsole, console, listed, table
from shardproof.cli.output_file import OutputFile
from shardproof.errors import UsageError
from shardproof.leaves import DEFAULT_LEAVES, check_degree
from shardproof.mistakes import CHAPTERS, Mistake, find_mistake
from shardproof.mistakes.outcome import Outcome, amount, make
from shardproof.wording import short_repr

HEIGHT, STRIDE = 10, 3  # of a plot of losses: lines, and columns of a step
RIGHT, WRONG, BOTH = "o", "x", "*"  # the marks of a plot


@click.command("break", context_settings=HELP_OPTIONS)
@click.argument("name", required=False)
@click.option(
    "--degrees",
    type=Degrees(),
    metavar="LIST",
    help="How many ranks, separated by commas; degree 1 is added to one other degree, where bits "
    "must be compared.  [default: those at which it shows]",
)
@json_option("what is found")
@click.option("--list", "wants_list", is_flag=True, help="List the mistakes, and run nothing.")
def break_(
    name: str | None,
    degrees: tuple[int, ...] | None,
    json_file: OutputFile | None,
    wants_list: bool,
) -> int:
    """Make the mistake NAME, on ranks that are threads of this process.

    Shows the lines that were changed, the first tensor that differs and by how much, the losses
    beside the right ones, why it happens, and what the prover says. docs/mistakes.md has all of
    them with drawings.

    Exit code 0: the prover names the mistake as that page says. 1: it does not, at these degrees.
    2: wrong usage, or an error that says what to do.
    """
    refuse_torchrun("break")
    if wants_list:
        return _list(name, json_file)
    if name is None:
        raise UsageError(
            "shardproof break needs the name of a mistake, such as row-bias-on-every-rank. See "
            "all: shardproof break --list."
        )
    mistake = find_mistake(name)
    for degree in degrees or ():
        check_degree(degree, DEFAULT_LEAVES)
    outcome = make(mistake, degrees or ())
    if json_file is not None:
        json_file.write(as_json(outcome))
    added = [degree for degree in outcome.degrees if degrees and degree not in degrees]
    show(outcome, console(), added=added)
    return 0 if outcome.is_named else 1


def _list(name: str | None, json_file: OutputFile | None) -> int:
    """Print the names of all mistakes."""
    if name is not None:
        raise UsageError(f"--list takes no name, got {short_repr(name)}. Leave one of them out.")
    if json_file is not None:
        chapters = [
            {"title": title, "mistakes": [dict(each.as_dict()) for each in mistakes]}
            for title, mistakes in CHAPTERS
        ]
        json_file.write({"chapters": chapters})
    out = console()
    for title, mistakes in CHAPTERS:
        out.heading(title)
        columns = ["name", "mistake", *(["the prover names"] if out.width >= WIDE else [])]
        grid = table(*columns, width=out.width)
        for mistake in mistakes:
            cells = mistake.name, mistake.title, mistake.finding.tensor
            grid.add_row(*cells[: len(columns)])
        for place, column in enumerate(grid.columns):
            column.no_wrap = place != 1
        out.block(grid)
    return 0


def as_json(outcome: Outcome) -> dict[str, Any]:
    """A mistake and its effects, as plain data."""
    return {
        **outcome.mistake.as_dict(),
        "degrees": list(outcome.degrees),
        "named": outcome.is_named,
        "verdict": outcome.verdict,
        "first_tensor": outcome.first.name if outcome.first is not None else None,
        "max_abs_diff": outcome.apart,
        "losses": {"right": list(outcome.right), "wrong": list(outcome.wrong)},
        "stopped": outcome.stopped,
        "report": outcome.report.as_dict() if outcome.report is not None else None,
    }


def show(outcome: Outcome, out: PlainConsole, *, added: Sequence[int] = ()) -> None:
    """Print the mistake and its effects; the last line is the answer.

    Args:
        outcome: the effects of the mistake.
        out: where to.
        added: degrees that were not asked for.
    """
    mistake = outcome.mistake
    out.heading(mistake.name)
    out.show(Text(mistake.title))
    if mistake.sighting:
        out.show(Text(f"Seen in: {mistake.sighting}."))
    out.print()
    _show_edit(mistake, out)
    out.whole_line(f"first tensor that differs: {outcome.difference}")
    _show_losses(outcome, out)
    out.show(Text(f"Why: {mistake.why}"))
    out.print()
    out.whole_line(f"The prover says: {outcome.verdict}")
    if outcome.stopped:
        out.whole_line(f"Outside of the prover the ranks stop: {outcome.stopped}")
    for degree in added:
        out.whole_line(f"Degree {degree} was added: one degree alone shows no difference of bits.")
    out.print()
    answer, style = _answer(outcome)
    out.whole_line(answer, style)


def _show_edit(mistake: Mistake, out: PlainConsole) -> None:
    edit = mistake.edit
    out.whole_line(f"{edit.file}, line {edit.line}, in {edit.plain.__qualname__}:")
    for word, lines, style in (("right", edit.right, GOOD), ("wrong", edit.wrong, BAD)):
        for line in lines.splitlines():
            out.whole_line(f"  {word} | {line}", style)
    out.print()


def _show_losses(outcome: Outcome, out: PlainConsole) -> None:
    if not outcome.wrong:
        return
    out.whole_line(
        f"loss of {len(outcome.right)} steps: {RIGHT} right, {WRONG} at degree "
        f"{outcome.degrees[-1]} with the mistake, {BOTH} both"
    )
    for line in plot(outcome.right, outcome.wrong):
        out.whole_line(f"  {line}")
    ends = ", ".join(
        f"{word} from {amount(losses[0])} to {amount(losses[-1])}"
        for word, losses in (("right", outcome.right), ("wrong", outcome.wrong))
    )
    out.whole_line(f"  {ends}")
    out.print()


def _answer(outcome: Outcome) -> tuple[str, str]:
    at = f"degree{'s' if len(outcome.degrees) > 1 else ''} {listed(outcome.degrees)}"
    if outcome.is_named:
        return f"Named: the prover finds the mistake at {at}, as docs/mistakes.md says.", GOOD
    if outcome.report is not None and outcome.report.proved:
        shows = listed(outcome.mistake.degrees)
        return f"Not named: nothing shows at {at}. It shows when degrees {shows} are run.", BAD
    return f"Not named: at {at} something else came of it than docs/mistakes.md says.", BAD


def bounds(right: Sequence[float], wrong: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest loss of a plot, at most twice the largest right loss.

    >>> bounds([4.0, 1.0], [4.5, 1e9, float("nan")])
    (0.0, 8.0)
    >>> bounds([4.0, 1.0], [4.5, -2.0])
    (-2.0, 4.5)
    """
    finite = [loss for loss in (*right, *wrong) if math.isfinite(loss)]
    return min(0.0, *finite), min(max(finite), 2 * max(right))


def plot(right: Sequence[float], wrong: Sequence[float]) -> list[str]:
    """Plot two curves as text. Infinite losses and NaN are left out; larger ones are at the top.

    Args:
        right: a loss for every step.
        wrong: the same, perhaps fewer.
    """
    bottom, top = bounds(right, wrong)
    grid = [[" "] * (STRIDE * len(right)) for _ in range(HEIGHT)]
    for losses, mark in ((right, RIGHT), (wrong, WRONG)):
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                continue
            share = (top - min(loss, top)) / ((top - bottom) or 1.0)
            line, place = round(share * (HEIGHT - 1)), STRIDE * step
            grid[line][place] = mark if grid[line][place] == " " else BOTH
    labels = [amount(top), *[""] * (HEIGHT - 2), amount(bottom)]
    width = max(map(len, labels))
    return [
        f"{label:>{width}} |{''.join(marks).rstrip()}"
        for label, marks in zip(labels, grid, strict=True)
    ]
