"""`python -m benchmarks`: side by side with plain torch and with other libraries, in one run."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import plot
from benchmarks.planning import QUICK_ROUNDS, ROUNDS, plan
from benchmarks.report import TextTable, rounds_text, tables
from benchmarks.run import run
from benchmarks.systems import SYSTEMS
from benchmarks.works import WORKS
from shardproof.errors import UsageError

DESCRIPTION = f"""
Every system runs in processes of its own with one thread per rank. Its first step must agree with
plain torch, and the bits of all invariant systems with each other. Then all systems take turns,
round by round. A step takes as long as its slowest rank. The ratio is to plain torch with 2 threads
in the same rounds; below 1 is faster. Works: {", ".join(work.name for work in WORKS)}. Systems:
{", ".join(system.name for system in SYSTEMS)}. Exit code 0: all was right and measured. 1: a system
was wrong or failed, and was not measured. 2: wrong usage.
"""
SUFFIXES = (".png", ".svg", ".pdf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        check(given)
        made = plan(given.work, given.system, rounds=given.rounds, is_quick=given.quick)
    except UsageError as error:
        parser.error(str(error))

    def keep(report: dict[str, Any]) -> None:
        if given.json is not None:
            given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    command = shlex.join(["python", "-m", "benchmarks", *(arguments or sys.argv[1:])])
    report = run(made, command=command, progress=tell, keep=keep)
    keep(report)
    if given.plot is not None:
        plot.draw(report, given.plot)
    show(report)
    return 1 if report["failed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=DESCRIPTION)
    parser.add_argument(
        "--work",
        metavar="ID",
        action="append",
        default=[],
        help="measure this work; may be given again; default: all",
    )
    parser.add_argument(
        "--system",
        metavar="ID",
        action="append",
        default=[],
        help="measure this system; may be given again. The system that a work compares with is "
        "measured too. Default: all that are installed",
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=positive,
        help=f"how often every system gets its turn; default: {ROUNDS}, {QUICK_ROUNDS} if --quick",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, sizes and degrees; noisy"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="also write the report to FILE, after every work"
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="also draw it; needs the extra 'plot'"
    )
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        ValueError: `text` is none.
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def check(given: argparse.Namespace) -> None:
    """Find what would only fail after the work.

    Raises:
        UsageError: an option or the environment does not allow the run.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise UsageError("benchmarks start their own ranks and cannot run under torchrun")
    for option, path in (("--json", given.json), ("--plot", given.plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"{option} {path} cannot be written: name a file in a directory")
    if given.plot is not None and given.plot.suffix not in SUFFIXES:
        raise UsageError(f"--plot {given.plot} must end in one of: {', '.join(SUFFIXES)}")
    if given.plot is not None and not plot.is_installed():
        raise UsageError(f"--plot needs matplotlib. Run: pip install '.[{plot.EXTRA}]'")


def tell(done: int, total: int, text: str, /) -> None:
    """Say on standard error what is next: in a terminal on one line that is written again."""
    end = "\033[K\r" if sys.stderr.isatty() else "\n"
    print(f"[{done}/{total}] {text}", end=end, file=sys.stderr, flush=True)


def show(report: dict[str, Any]) -> None:
    """Print the tables, what was left out, what failed, and the answer last."""
    descriptions = {work.name: work.description for work in WORKS}
    for table in tables(report):
        _show_table(table, descriptions.get(table.title))
    if report["results"]:
        print("ratio: to torch-2t in the same rounds; below 1 is faster")
    environment = report["environment"]
    print(
        f"{environment['cpu']}, {environment['cores']} cores, torch {environment['torch']}, "
        f"{rounds_text(report)}{' (quick)' if report['quick'] else ''}"
    )
    for (where, reason), names in _skipped(report).items():
        print(f"skipped{where}: {', '.join(names)}: {reason}")
    for failure in report["failed"]:
        known = ("work", "system", "ranks", "reason")
        keys = [str(value) for key, value in failure.items() if key not in known]
        where = " ".join([failure["work"], *keys])
        print(f"FAILED at {where}: {failure['system']} on {failure['ranks']}: {failure['reason']}")
    failed = dict.fromkeys(failure["system"] for failure in report["failed"])
    if failed:
        print(f"Not measured: {', '.join(failed)} failed or computed something else.")
    else:
        count = len({row["system"] for row in report["results"] + report["all_reduce"]})
        print(f"Measured: {count} systems, all of which computed the same.")


def _show_table(table: TextTable, description: str | None) -> None:
    print(f"== {table.title}", *([description] if description else []), "", sep="\n")
    grid = Table(box=None, pad_edge=False)
    for place, column in enumerate(table.columns):
        grid.add_column(column, justify="right" if place else "left", no_wrap=not place)
    for row in table.rows:
        grid.add_row(*row)
    Console().print(grid, "")


def _skipped(report: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Where and why -> the systems, or the works, that are left out."""
    skipped: dict[tuple[str, str], list[str]] = {}
    for skip in report["skipped"]:
        work, system = skip["work"], skip["system"]
        where = f" at {work}" if work and system else ""
        skipped.setdefault((where, skip["reason"]), []).append(system or work)
    return skipped


if __name__ == "__main__":
    sys.exit(main())
