"""`shardproof bench`: side by side with plain torch and with the peers, in one run."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.padding import Padding
from rich.text import Text

from shardproof import torchrun
from shardproof.bench import plot
from shardproof.bench.jobs import QUICK_ROUNDS, ROUNDS, Plan, plan
from shardproof.bench.run import run
from shardproof.bench.systems.catalog import system_names
from shardproof.bench.tables import TextTable, rounds_text, tables
from shardproof.bench.works.catalog import find_work, work_names
from shardproof.cli import options
from shardproof.cli.options import HELP_OPTIONS
from shardproof.cli.output import BAD, GOOD, PlainConsole, console, listed, progress, table
from shardproof.cli.output_file import OutputFile, checked_picture
from shardproof.errors import UsageError

Data = dict[str, Any]


@click.command(context_settings=HELP_OPTIONS)
@click.option(
    "--work",
    "works",
    metavar="ID",
    multiple=True,
    help=f"Measure this work; may be given again. One of: {', '.join(work_names())}.  "
    "[default: all]",
)
@click.option(
    "--system",
    "systems",
    metavar="ID",
    multiple=True,
    help=f"Measure this system; may be given again. One of: {', '.join(system_names())}. What a "
    "work measures against is measured too.  [default: all that are installed]",
)
@click.option(
    "--rounds",
    metavar="N",
    help=f"How often every system gets its turn.  [default: {ROUNDS}; {QUICK_ROUNDS} if --quick]",
)
@click.option(
    "--quick", is_flag=True, help="A glance: fewer rounds, fewer sizes and degrees. Noisy."
)
@click.option(
    "--json", "json_path", metavar="FILE", help="Also write the report to FILE, after every work."
)
@click.option("--plot", "plot_path", metavar="FILE", help="Also draw it; needs the extra 'plot'.")
def bench(**given: Any) -> int:
    """Measure side by side with plain torch and with the peers.

    Every system runs in processes of its own with one thread per rank. Its first step must agree
    with plain torch, and the bits of all invariant systems with each other; then all systems take
    turns, round by round. A step takes as long as its slowest rank; the ratio is to plain torch
    with 2 threads in the same rounds, and below 1 is faster.

    Exit code 0: all was right and measured. 1: a system was wrong or failed, and was not measured.
    2: wrong usage, or an error that says what to do.
    """
    request = check(Given(**given))
    target = request.target
    keep = target.write if target is not None and target.is_replaced else None
    with progress(is_speaker=True) as tell:
        report = run(request.plan, command=request.command, progress=tell, keep=keep)
    if target is not None:
        target.write(report)
    if request.picture is not None:
        plot.draw(report, request.picture)
    show(report, console())
    return 1 if report["failed"] else 0


@dataclass(frozen=True)
class Given:
    """The options as they were written; None where one was not given."""

    works: tuple[str, ...]
    systems: tuple[str, ...]
    rounds: str | None
    quick: bool
    json_path: str | None
    plot_path: str | None


@dataclass(frozen=True)
class Request:
    """What is to be done.

    Attributes:
        plan: who is measured at what.
        command: as it was typed, for the report.
        target: where the report goes.
        picture: where the plot goes.
    """

    plan: Plan
    command: str
    target: OutputFile | None
    picture: Path | None


def check(given: Given) -> Request:
    """Everything that can be wrong before a process is started is found here.

    Raises:
        UsageError: an option or the environment does not allow the work.
    """
    if torchrun.read(os.environ) is not None:
        raise UsageError(
            "shardproof bench starts its own ranks and cannot run under torchrun. Run it without."
        )
    rounds = None
    if given.rounds is not None:
        rounds = options.positive(given.rounds, option="--rounds", example=ROUNDS)
    picture = None
    if given.plot_path is not None:
        picture = checked_picture(
            given.plot_path, is_installed=plot.is_installed(), example="bench.png"
        )
    made = plan(given.works, given.systems, rounds=rounds, is_quick=given.quick)
    target = None if given.json_path is None else OutputFile(given.json_path)
    command = shlex.join(["shardproof", *sys.argv[1:]])
    return Request(made, command, target, picture)


def show(report: Data, out: PlainConsole) -> None:
    """Print the tables, what was left out, what failed, and the answer last."""
    for made in tables(report):
        _show_table(made, out)
    if report["results"]:
        _line("ratio: to torch-2t in the same rounds; below 1 is faster", out)
    environment = report["environment"]
    _line(
        f"{environment['cpu']}, {environment['cores']} cores, torch {environment['torch']}, "
        f"{rounds_text(report)}{' (quick)' if report['quick'] else ''}",
        out,
    )
    for (where, reason), names in _skipped(report).items():
        _line(f"skipped{where}: {listed(names)}: {reason}", out)
    for failure in report["failed"]:
        out.print(Text(_failed(failure), BAD), soft_wrap=True)
    out.print(_verdict(report), soft_wrap=True)


def _skipped(report: Data) -> dict[tuple[str, str], list[str]]:
    """Where and why -> the systems, or the works, that are left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for skip in report["skipped"]:
        work, system = skip["work"], skip["system"]
        where = f" at {work}" if work and system else ""
        found.setdefault((where, skip["reason"]), []).append(system or work)
    return found


def _show_table(made: TextTable, out: PlainConsole) -> None:
    names = {work: find_work(work).description for work in work_names()}
    out.show(Text(f"== {made.title}", "bold"))
    if made.title in names:
        out.show(Text(names[made.title]))
    out.print()
    grid = table(*made.columns, width=out.width, right=made.columns[1:])
    grid.columns[0].no_wrap = True
    for row in made.rows:
        grid.add_row(*row)
    out.show(Padding(grid, (0, 0, 0, 1)))
    out.print()


def _failed(failure: Data) -> str:
    known = ("work", "system", "ranks", "reason")
    keys = [str(value) for key, value in failure.items() if key not in known]
    where = " ".join([failure["work"], *keys])
    return f"FAILED at {where}: {failure['system']} on {failure['ranks']}: {failure['reason']}"


def _verdict(report: Data) -> Text:
    failed: Sequence[Data] = report["failed"]
    if failed:
        names = listed(dict.fromkeys(failure["system"] for failure in failed))
        return Text(f"Not measured: {names} failed or computed something else.", BAD)
    count = len({row["system"] for row in report["results"] + report["all_reduce"]})
    return Text(f"Measured: {count} systems, all of which computed the same.", GOOD)


def _line(text: str, out: PlainConsole) -> None:
    """One line, whole at any width, so that it can be searched for."""
    out.print(Text(text), soft_wrap=True)
