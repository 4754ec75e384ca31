"""A report of `shardproof prove` in a terminal: case by case, then the summary and the verdict.

It reads the same plain data that `--json` writes.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from shardproof.cli.output import (
    BAD,
    GOOD,
    INDENT,
    WIDE,
    PlainConsole,
    calls_text,
    grouped,
    listed,
    ranges,
    seconds,
    shape,
    size,
    table,
    yes_no,
)
from shardproof.cli.tensor_table import (
    MOST_DIFFERING,
    condense,
    later_text,
    split_later,
    tensor_table,
)
from shardproof.extras import install_command

NUMBER_WIDTH = 10  # of a number of a tensor

Data = dict[str, Any]
Row = tuple[str | Text, str | Text]


def show_report(report: Data, verdict: str, out: PlainConsole) -> None:
    """Print a report; the last line is the verdict.

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
    out.whole_line(f"ranks: {ranks}, numerics: {report['numerics']}, seed: {report['seed']}")
    if report.get("transport_note"):
        out.whole_line(f"transport: {report['transport']}, {report['transport_note']}")
    out.whole_line(f"contract: {report['contract']}")
    if report["skipped"]:
        out.whole_line(skipped_text(report["skipped"]))
    for each in report.get("resumed", ()):
        pairs = ", ".join(f"{saved} to {resumed}" for saved, resumed in each["pairs"])
        answer = "the bits of the unbroken run" if each["same"] else "NOT the unbroken run"
        out.whole_line(f"resumed: {each['case']}, degrees {pairs}: {answer}")
    if "against" in report:
        out.whole_line(f"against: {report['against']['text']}")
    is_good = report["proved"] and ("against" not in report or report["against"]["same"])
    out.whole_line(verdict, GOOD if is_good else BAD)


def show_case(case: Data, out: PlainConsole) -> None:
    """Print one case."""
    out.heading(case["name"])
    out.show(Text(case["description"]))
    degrees = f"degree{'s' if len(case['degrees']) > 1 else ''} {listed(case['degrees'])}"
    source = f"{case['source']}, " if case["source"] else ""
    out.show(Text(f"{source}{degrees}, {seconds(case['seconds'])} s"))
    out.print()
    rows, later = split_later(case["tensors"])
    tensors = tensor_table(condense(rows), width=out.width - INDENT)
    out.block(Group(tensors, later_text(later)) if later else tensors)
    out.block(facts_table(case))
    show_values(case, out)


def show_cases(cases: list[Data], out: PlainConsole) -> None:
    """Print what `--list` lists."""
    out.show(case_table(cases, width=out.width))


def ranks_text(engine: str, transport: str) -> str:
    """Engine and transport, as one word where both have the same name.

    >>> ranks_text("processes", "gloo"), ranks_text("threads", "threads")
    ('processes over gloo', 'threads')
    """
    return engine if engine == transport else f"{engine} over {transport}"


def skipped_text(skipped: list[Data]) -> str:
    """One line about the cases that lack their extra."""
    cases = [f"{case['name']} (needs the extra {case['extra']!r})" for case in skipped]
    extras = dict.fromkeys(case["extra"] for case in skipped)
    return f"skipped: {listed(cases)}; {install_command(extras)}"


def facts_table(case: Data) -> Table:
    """The case's checks, memory and communication, one line each."""
    return grouped(
        [
            ("findings", _findings(case)),
            ("rounding", _decided(case["tensors"])),
            ("checks", _checks(case["checks"])),
            ("memory", _memory(case["memory"])),
            ("sent", _sent(case["comm"])),
        ]
    )


def _findings(case: Data) -> Iterator[Row]:
    for degree in case.get("uncut_degrees", ()):
        yield Text("FAULT", BAD), f"nothing was cut or nothing was sent at degree {degree}"
    for tensor in case["tensors"]:
        if tensor.get("nonfinite") and not case.get("allows_nonfinite"):
            where = ", ".join(f"{count} at {at}" for at, count in tensor["nonfinite"].items())
            yield Text("FAULT", BAD), f"{tensor['name']}: not finite ({where})"
        for finding in tensor["findings"]:
            yield Text("FAULT", BAD), f"{tensor['name']}: {finding}"


def _decided(tensors: Sequence[Data]) -> Iterator[Row]:
    """The tensors whose difference from plain PyTorch is within its own rounding."""
    decided = [tensor["name"] for tensor in tensors if tensor.get("decided_by_rounding")]
    if decided:
        others = f" and {len(decided) - MOST_DIFFERING} more" if decided[MOST_DIFFERING:] else ""
        yield "decides", f"some numbers of {', '.join(decided[:MOST_DIFFERING])}{others}"


def _checks(checks: Sequence[Data]) -> Iterator[Row]:
    for check in checks:
        answer = Text("passed", GOOD) if check["passed"] else Text("FAILED", BAD)
        detail = f": {check['detail']}" if check["detail"] else ""
        yield answer, f"{check['name']}{detail}"


def _memory(memory: Data) -> Iterator[Row]:
    for degree, ranks in memory.items():
        worst = max(ranks, key=lambda rank: rank["largest_bytes"] - rank["bound_bytes"])
        largest = f"largest {size(worst['largest_bytes'])} ({shape(worst['largest_shape'])})"
        text = Text(f"{largest} on rank {worst['rank']}, bound {size(worst['bound_bytes'])}")
        # At degree 1 there is nothing to stay below: the only rank has everything.
        if int(degree) >= 2 and worst["largest_bytes"] > worst["bound_bytes"]:
            text += Text(" EXCEEDED", BAD)
        yield f"degree {degree}", text


def _sent(comm: Data) -> Iterator[Row]:
    """The collectives of each degree; degrees that sent the same share a row."""
    degrees: dict[str, list[int]] = {}
    for degree, directions in comm.items():
        parts = [
            f"{direction} {calls_text(kinds)}"
            for direction, kinds in directions.items()
            if kinds and direction != "setup"
        ]
        degrees.setdefault("\n".join(parts) or "nothing", []).append(int(degree))
    for text, same in degrees.items():
        yield f"degree {ranges(same)}", text


def summary_table(cases: Sequence[Data], *, width: int) -> Table:
    """One row per case."""
    torch = "agrees with torch" if width >= WIDE else "agrees\nwith torch"
    grid = table(
        "case", "degrees", "same bits", torch, "memory", "checks", "seconds",
        width=WIDE, right=("seconds",),
    )  # fmt: skip
    for case in cases:
        passed = [check["passed"] for check in case["checks"]]
        grid.add_row(
            case["name"],
            ", ".join(map(str, case["degrees"])),
            yes_no(case["identical"]),
            yes_no(case["agrees_with_torch"]),
            yes_no(case["within_memory_bound"]),
            Text(f"{sum(passed)} of {len(passed)}", "" if all(passed) else BAD) if passed else "-",
            seconds(case["seconds"]),
        )
    return grid


def case_table(cases: Sequence[Data], *, width: int) -> Table:
    """The table of `--list`: name, description, source and extra of each case."""
    grid = table("case", "shows", "source", "extra", width=WIDE)
    for case in cases:
        needs = case["extra"] or "-"
        if case["extra"] and not case["installed"]:
            needs = f"{case['extra']}, not installed"
        source = case["source"] or "-"
        grid.add_row(case["name"], case["description"], _short(source, width), needs)
    return grid


def _short(source: str, width: int) -> str:
    """The name of a source document; its start where room is short.

    >>> _short("002_bff0c980e9c9c989.txt", 80)
    '002_bff0...'
    """
    if width >= WIDE or not re.match(r"\d+_[0-9a-f]{8,}", source):
        return source
    return f"{source[:8]}..."


def show_values(case: Data, out: PlainConsole) -> None:
    """Print the small tensors of a case, and its notebook's results beside ours.

    Args:
        case: as a report has it, grid with values.
        out: where to.
    """
    tensors = [tensor for tensor in case["tensors"] if tensor.get("shown")]
    room = out.width - INDENT
    if tensors:
        out.block(Group(*(_values(tensor, room=room) for tensor in tensors)))
    if case.get("notebook"):
        out.block(_beside(case, width=room))


def _values(tensor: Data, *, room: int) -> Text:
    values = tensor["shown"]
    shapes_by_degree = {degree: _held(shapes) for degree, shapes in values["held"].items()}
    where = "; ".join(f"degree {degree}: {text}" for degree, text in shapes_by_degree.items())
    whose = "" if tensor["identical"] else f"; the numbers of degree {values['degree']}"
    head = f"{tensor['name']} ({shape(tensor['shape'])}; a rank holds, at {where}{whose})"
    if values["ours"] is None:
        return Text(f"{head}: too large to show")
    return Text("\n".join([head, *_lines(values["ours"], max(1, room // NUMBER_WIDTH))]))


def _held(shapes: list[list[int]]) -> str:
    """The shapes that ranks hold, equal ones once.

    >>> _held([[2, 6], [2, 6]]), _held([[3], [1]])
    ('2x6', '3, 1')
    """
    texts = [shape(each) for each in shapes]
    return ", ".join(texts if len(set(texts)) > 1 else texts[:1])


def _lines(numbers: Any, room: int) -> Iterator[str]:
    """The numbers row by row; a row that is too long goes on in the next line."""
    if not isinstance(numbers, list | tuple):
        yield f"{numbers:{NUMBER_WIDTH}.4f}"
        return
    if numbers and isinstance(numbers[0], list | tuple):
        for row in numbers:
            yield from _lines(row, room)
        return
    for start in range(0, len(numbers), room):
        yield "".join(f"{number:{NUMBER_WIDTH}.4f}" for number in numbers[start : start + room])


def _beside(case: Data, *, width: int) -> Table:
    grid = table("notebook prints", "what", "notebook", "ours", width=width)
    for row in case["notebook"]:
        section = f"{row['section']}: " if row["section"] else ""
        ours = Text(row["ours"], BAD if row["same"] is False else "")
        grid.add_row(f"{section}{row['label']}", row["what"], row["notebook"], ours)
    return grid
