"""`shardproof break`: make a mistake on purpose, and see what it does and what the prover says."""

import os
from collections.abc import Sequence
from typing import Any

import click
from rich.padding import Padding
from rich.text import Text

from shardproof.cli import options, torchrun
from shardproof.cli.json_file import JsonFile
from shardproof.cli.losses import BOTH, RIGHT, WRONG, plot
from shardproof.cli.options import HELP_OPTIONS
from shardproof.cli.output import BAD, GOOD, WIDE, PlainConsole, console, listed, table
from shardproof.errors import UsageError
from shardproof.leaves import DEFAULT_LEAVES
from shardproof.mistakes import CHAPTERS, Mistake, find_mistake
from shardproof.mistakes.outcome import Outcome, amount, make
from shardproof.wording import shown

INDENT = 2


@click.command("break", context_settings=HELP_OPTIONS)
@click.argument("name", required=False)
@click.option(
    "--degrees",
    metavar="LIST",
    help="How many ranks, separated by commas; degree 1 is added to one other degree, where bits "
    "must be compared.  [default: those at which it shows]",
)
@click.option("--json", "json_path", metavar="FILE", help="Also write what is found to FILE.")
@click.option("--list", "wants_list", is_flag=True, help="List the mistakes, and run nothing.")
def break_(name: str | None, degrees: str | None, json_path: str | None, wants_list: bool) -> int:
    """Make the mistake NAME, on ranks that are threads of this process.

    Shows the lines that were changed, the first tensor that differs and by how much, the losses
    beside the right ones, why it happens, and what the prover says. docs/mistakes.md has all of
    them with drawings.

    Exit code 0: the prover names the mistake as that page says. 1: it does not, at these degrees.
    2: wrong usage, or an error that says what to do.
    """
    if torchrun.read(os.environ) is not None:
        raise UsageError(
            "shardproof break starts its own ranks and cannot run under torchrun. Run it without."
        )
    if wants_list:
        return _list(name, json_path)
    if name is None:
        raise UsageError(
            "shardproof break needs the name of a mistake, such as row-bias-on-every-rank. See "
            "all: shardproof break --list."
        )
    mistake = find_mistake(name)
    asked = () if degrees is None else options.degrees(degrees, leaves=DEFAULT_LEAVES)
    target = JsonFile(json_path) if json_path is not None else None
    outcome = make(mistake, asked)
    if target is not None:
        target.write(as_json(outcome))
    show(
        outcome, console(), added=[each for each in outcome.degrees if asked and each not in asked]
    )
    return 0 if outcome.is_named else 1


def _list(name: str | None, json_path: str | None) -> int:
    """Print what can be made."""
    if name is not None:
        raise UsageError(f"--list takes no name, got {shown(name)}. Leave one of them out.")
    target = JsonFile(json_path) if json_path is not None else None
    if target is not None:
        chapters = [
            {"title": title, "mistakes": [dict(each.as_dict()) for each in mistakes]}
            for title, mistakes in CHAPTERS
        ]
        target.write({"chapters": chapters})
    out = console()
    for title, mistakes in CHAPTERS:
        out.show(Text(f"== {title}", "bold"))
        columns = ["name", "mistake", *(["the prover names"] if out.width >= WIDE else [])]
        grid = table(*columns, width=out.width)
        for mistake in mistakes:
            cells = mistake.name, mistake.title, mistake.finding.tensor
            grid.add_row(*cells[: len(columns)])
        for place, column in enumerate(grid.columns):
            column.no_wrap = place != 1
        out.show(Padding(grid, (0, 0, 0, 1)))
        out.print()
    return 0


def as_json(outcome: Outcome) -> dict[str, Any]:
    """One mistake and what came of it, as plain data."""
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
    """Print everything a person wants to know; the last line is the answer.

    Args:
        outcome: what came of the mistake.
        out: where to.
        added: degrees that were not asked for.
    """
    mistake = outcome.mistake
    out.show(Text(f"== {mistake.name}", "bold"))
    out.show(Text(mistake.title))
    if mistake.seen:
        out.show(Text(f"Seen in: {mistake.seen}."))
    out.print()
    _show_edit(mistake, out)
    _line(f"first tensor that differs: {outcome.difference}", out)
    _show_losses(outcome, out)
    out.show(Text(f"Why: {mistake.why}"))
    out.print()
    _line(f"The prover says: {outcome.verdict}", out)
    if outcome.stopped:
        _line(f"Outside of the prover the ranks stop: {outcome.stopped}", out)
    for degree in added:
        _line(f"Degree {degree} was added: one degree alone shows no difference of bits.", out)
    out.print()
    answer, style = _answer(outcome)
    out.print(Text(answer, style), soft_wrap=True)


def _show_edit(mistake: Mistake, out: PlainConsole) -> None:
    edit = mistake.edit
    _line(f"{edit.file}, line {edit.line}, in {edit.plain.__qualname__}:", out)
    for word, lines, style in (("right", edit.right, GOOD), ("wrong", edit.wrong, BAD)):
        for line in lines.splitlines():
            out.print(Text(f"{' ' * INDENT}{word} | {line}", style), soft_wrap=True)
    out.print()


def _show_losses(outcome: Outcome, out: PlainConsole) -> None:
    if not outcome.wrong:
        return
    _line(
        f"loss of {len(outcome.right)} steps: {RIGHT} right, {WRONG} at degree "
        f"{outcome.degrees[-1]} with the mistake, {BOTH} both",
        out,
    )
    for line in plot(outcome.right, outcome.wrong):
        out.print(Text(f"{' ' * INDENT}{line}"), soft_wrap=True)
    ends = ", ".join(
        f"{word} from {amount(losses[0])} to {amount(losses[-1])}"
        for word, losses in (("right", outcome.right), ("wrong", outcome.wrong))
    )
    _line(f"{' ' * INDENT}{ends}", out)
    out.print()


def _answer(outcome: Outcome) -> tuple[str, str]:
    at = f"degree{'s' if len(outcome.degrees) > 1 else ''} {listed(outcome.degrees)}"
    if outcome.is_named:
        return f"Named: the prover finds the mistake at {at}, as docs/mistakes.md says.", GOOD
    if outcome.report is not None and outcome.report.proved:
        shows = listed(outcome.mistake.degrees)
        return f"Not named: nothing shows at {at}. It shows when degrees {shows} are run.", BAD
    return f"Not named: at {at} something else came of it than docs/mistakes.md says.", BAD


def _line(text: str, out: PlainConsole) -> None:
    """One line, whole at any width, so that it can be searched for."""
    out.print(Text(text), soft_wrap=True)
