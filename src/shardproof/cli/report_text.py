"""A whole report on standard output: case by case, then the summary, and the verdict last."""

from typing import Any

from rich.padding import Padding
from rich.text import Text

from shardproof.cli.condense import condense
from shardproof.cli.output import BAD, GOOD, PlainConsole, listed, seconds
from shardproof.cli.table import (
    case_table,
    facts_table,
    later_text,
    split_later,
    summary_table,
    tensor_table,
)
from shardproof.cli.values import show_values

INDENT = 1

Data = dict[str, Any]


def show_report(report: Data, verdict: str, out: PlainConsole) -> None:
    """Print everything a person wants to know; the last line is the verdict.

    Args:
        report: as `--json` has it.
        verdict: one sentence.
        out: where to.
    """
    for case in report["cases"]:
        show_case(case, out)
    out.show(summary_table(report["cases"], width=out.width))
    out.print()
    ranks = ranks_text(report["engine"], report["transport"])
    _line(f"ranks: {ranks}, numerics: {report['numerics']}, seed: {report['seed']}", out)
    if report.get("transport_note"):
        _line(f"transport: {report['transport']}, {report['transport_note']}", out)
    _line(f"contract: {report['contract']}", out)
    if report["skipped"]:
        _line(skipped_text(report["skipped"]), out)
    if "against" in report:
        _line(f"against: {report['against']['text']}", out)
    is_good = report["proved"] and ("against" not in report or report["against"]["same"])
    out.print(Text(verdict, GOOD if is_good else BAD), soft_wrap=True)


def show_case(case: Data, out: PlainConsole) -> None:
    """Print one case."""
    out.show(Text(f"== {case['name']}", "bold"))
    out.show(Text(case["description"]))
    degrees = f"degree{'s' if len(case['degrees']) > 1 else ''} {listed(case['degrees'])}"
    source = f"{case['source']}, " if case["source"] else ""
    out.show(Text(f"{source}{degrees}, {seconds(case['seconds'])} s"))
    out.print()
    rows, later = split_later(case["tensors"])
    width = out.width - INDENT
    out.show(Padding(tensor_table(condense(rows), width=width), (0, 0, 0, INDENT)))
    if later:
        out.show(Padding(later_text(later), (0, 0, 0, INDENT)))
    out.print()
    out.show(Padding(facts_table(case), (0, 0, 0, INDENT)))
    out.print()
    show_values(case, out)


def show_cases(cases: list[Data], out: PlainConsole) -> None:
    """Print what `--list` lists."""
    out.show(case_table(cases, width=out.width))


def ranks_text(engine: str, transport: str) -> str:
    """What the ranks were and what carried their bytes, without saying a word twice.

    >>> ranks_text("processes", "gloo"), ranks_text("threads", "threads")
    ('processes over gloo', 'threads')
    """
    return engine if engine == transport else f"{engine} over {transport}"


def skipped_text(skipped: list[Data]) -> str:
    """One line about the cases that lack their extra."""
    cases = [f"{case['name']} (needs the extra {case['extra']!r})" for case in skipped]
    extras = ",".join(dict.fromkeys(case["extra"] for case in skipped))
    return f"skipped: {listed(cases)}; pip install 'shardproof[{extras}]'"


def _line(text: str, out: PlainConsole) -> None:
    """One line, whole at any width, so that it can be searched for."""
    out.print(Text(text), soft_wrap=True)
