"""A report as tables for people. Reads the same plain data that `--json` writes."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from shardproof.cli.output import (
    BAD,
    GOOD,
    WIDE,
    listed,
    ranges,
    seconds,
    shape,
    size,
    small,
    table,
    yes_no,
)

HASH_LENGTH = 8
NAME_ROOM = 24  # for a tensor's name where the table has to save room
NAME_LINE = 21  # of a longer one, which is broken
MANY_LATER = 12  # so many tensors of later steps are a line, not rows
MOST_DIFFERING = 5  # of them that are shown where bits differ

Data = dict[str, Any]


def tensor_table(tensors: Sequence[Data], *, width: int) -> Table:
    """One row per tensor: the comparison with plain PyTorch, then the degrees among each other.

    Args:
        tensors: as a report has them, or kinds of them with a count.
        width: of the line.
    """
    is_wide = width >= WIDE
    made = table(
        "tensor",
        "shape",
        "exact",
        "approximate" if is_wide else "approx",
        "max diff" if is_wide else "max\ndiff",
        "fp64 error\nours/torch",
        "sha256",
        "same at\nevery degree" if is_wide else "same",
        width=width,
    )
    for column in made.columns[1:-1]:
        column.no_wrap = True
    for tensor in tensors:
        hashes, same = _bits(tensor, line_break=" " if is_wide else "\n")
        name = tensor["name"] if is_wide else _broken(tensor["name"])
        what = f"{tensor['count']} tensors" if "count" in tensor else shape(tensor["shape"])
        made.add_row(name, what, *_torch_cells(tensor), hashes, same)
    return made


def _broken(name: str) -> str:
    """A long name with line breaks at dots, where a reader would put them.

    >>> print(_broken("fp64: model.layers.0.mlp.down_proj.weight.grad"))
    fp64: model.layers.0.
    mlp.down_proj.weight.
    grad
    """
    if len(name) <= NAME_ROOM:
        return name
    lines = [""]
    for part in re.findall(r"[^.]*\.?", name):
        if lines[-1] and len(lines[-1]) + len(part) > NAME_LINE:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _torch_cells(tensor: Data) -> tuple[str | Text, ...]:
    torch, fp64 = tensor["torch"], tensor["fp64"]
    errors = f"{small(fp64['ours'])}/{small(fp64['torch'])}" if fp64 else "-"
    if not torch:
        missing: str | Text = Text("NO", BAD) if tensor["agreement_judged"] else "-"
        return "-", missing, "-", errors
    exact = "yes" if torch["exact"] else "no"
    return exact, yes_no(tensor["agrees"]), small(torch["max_abs_diff"]), errors


def _bits(tensor: Data, *, line_break: str) -> tuple[str, Text]:
    hashes = tensor["sha256"]
    if len(set(hashes.values())) == 1:
        shown = next(iter(hashes.values()))[:HASH_LENGTH]
    else:
        shown = "\n".join(f"{degree} {sha[:HASH_LENGTH]}" for degree, sha in hashes.items())
    if tensor["identical"]:
        return shown, yes_no(True)
    others = ", ".join(differing_degrees(tensor))
    return shown, Text(f"NO:{line_break}{others}" if others else "NO", BAD)


def differing_degrees(tensor: Data) -> list[str]:
    """The degrees at which a tensor has other bits than at the first degree.

    >>> differing_degrees({"sha256": {"1": "aa", "2": "aa", "3": "bb"}})
    ['3']
    """
    first, *others = tensor["sha256"] or [""]
    return [degree for degree in others if tensor["sha256"][degree] != tensor["sha256"][first]]


def split_later(tensors: Sequence[Data]) -> tuple[list[Data], list[Data]]:
    """The tensors that get a row, and those of later steps that are many enough for one line.

    Of the later ones the first that differ get a row all the same.
    """
    later = [tensor for tensor in tensors if not tensor["agreement_judged"]]
    if len(later) <= MANY_LATER:
        return list(tensors), []
    differing = [tensor["name"] for tensor in later if not tensor["identical"]][:MOST_DIFFERING]
    rows = [
        tensor for tensor in tensors if tensor["agreement_judged"] or tensor["name"] in differing
    ]
    return rows, later


def later_text(later: Sequence[Data]) -> Text:
    """One line about the tensors of later steps, by what their names say ("epoch 3: weight").

    A run of its own stands before that ("dropout: step 2: loss").
    """
    periods: dict[str, set[str]] = {}
    for tensor in later:
        match = re.match(r"(?:[a-z]+: )?([a-z]+) (\d+)\b", tensor["name"])
        if match:
            periods.setdefault(match[1], set()).add(match[2])
    each = listed(f"each of {len(found)} {period}s" for period, found in periods.items())
    what = f"recorded after {each or 'the first step'} ({len(later)} tensors)"
    differing = [tensor for tensor in later if not tensor["identical"]]
    if not differing:
        return Text(f"{what}: ") + Text("the same at every degree", GOOD)
    verdict = f"{len(differing)} differ, the first is {differing[0]['name']}"
    return Text(f"{what}: ") + Text(verdict, BAD)


def facts_table(case: Data) -> Table:
    """The case's checks, memory and communication, one line each."""
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for subject, rows in (
        ("findings", _findings(case)),
        ("rounding", _decided(case["tensors"])),
        ("checks", _checks(case["checks"])),
        ("memory", _memory(case["memory"])),
        ("sent", _sent(case["comm"])),
    ):
        for index, (what, text) in enumerate(rows):
            made.add_row(subject if index == 0 else "", what, text)
    return made


def _findings(case: Data) -> Iterator[tuple[str | Text, str | Text]]:
    for degree in case.get("uncut_degrees", ()):
        yield Text("FAULT", BAD), f"nothing was cut or nothing was sent at degree {degree}"
    for tensor in case["tensors"]:
        if tensor.get("nonfinite") and not case.get("allows_nonfinite"):
            where = ", ".join(f"{count} at {at}" for at, count in tensor["nonfinite"].items())
            yield Text("FAULT", BAD), f"{tensor['name']}: not finite ({where})"
        for finding in tensor["findings"]:
            yield Text("FAULT", BAD), f"{tensor['name']}: {finding}"


def _decided(tensors: Sequence[Data]) -> Iterator[tuple[str | Text, str | Text]]:
    """The tensors that agree because plain PyTorch's own rounding is as large as the difference."""
    decided = [tensor["name"] for tensor in tensors if tensor.get("decided_by_rounding")]
    if decided:
        others = f" and {len(decided) - MOST_DIFFERING} more" if decided[MOST_DIFFERING:] else ""
        yield "decides", f"some numbers of {', '.join(decided[:MOST_DIFFERING])}{others}"


def _checks(checks: Sequence[Data]) -> Iterator[tuple[str | Text, str | Text]]:
    for check in checks:
        answer = Text("passed", GOOD) if check["passed"] else Text("FAILED", BAD)
        detail = f": {check['detail']}" if check["detail"] else ""
        yield answer, f"{check['name']}{detail}"


def _memory(memory: Data) -> Iterator[tuple[str | Text, str | Text]]:
    for degree, ranks in memory.items():
        worst = max(ranks, key=lambda rank: rank["largest_bytes"] - rank["bound_bytes"])
        largest = f"largest {size(worst['largest_bytes'])} ({shape(worst['largest_shape'])})"
        text = Text(f"{largest} on rank {worst['rank']}, bound {size(worst['bound_bytes'])}")
        # At degree 1 there is nothing to stay below: the only rank has everything.
        if int(degree) >= 2 and worst["largest_bytes"] > worst["bound_bytes"]:
            text += Text(" EXCEEDED", BAD)
        yield f"degree {degree}", text


def _sent(comm: Data) -> Iterator[tuple[str | Text, str | Text]]:
    """What was sent, one entry for all degrees that sent the same."""
    degrees: dict[str, list[int]] = {}
    for degree, directions in comm.items():
        parts = [
            f"{direction} {_calls(kinds)}"
            for direction, kinds in directions.items()
            if kinds and direction != "setup"
        ]
        degrees.setdefault("\n".join(parts) or "nothing", []).append(int(degree))
    for text, same in degrees.items():
        yield f"degree {ranges(same)}", text


def _calls(kinds: Data) -> str:
    return listed(
        f"{count['calls']} {kind} ({size(count['message_bytes'])})" for kind, count in kinds.items()
    )


def summary_table(cases: Sequence[Data], *, width: int) -> Table:
    """One row per case."""
    torch = "agrees with torch" if width >= WIDE else "agrees\nwith torch"
    made = table(
        "case", "degrees", "same bits", torch, "memory", "checks", "seconds",
        width=WIDE, right=("seconds",),
    )  # fmt: skip
    for case in cases:
        passed = [check["passed"] for check in case["checks"]]
        made.add_row(
            case["name"],
            ", ".join(map(str, case["degrees"])),
            yes_no(case["identical"]),
            yes_no(case["agrees_with_torch"]),
            yes_no(case["within_memory_bound"]),
            Text(f"{sum(passed)} of {len(passed)}", "" if all(passed) else BAD) if passed else "-",
            seconds(case["seconds"]),
        )
    return made


def case_table(cases: Sequence[Data], *, width: int) -> Table:
    """What `--list` shows: the cases, what they show, where they come from, what they need."""
    made = table("case", "shows", "source", "extra", width=WIDE)
    for case in cases:
        needs = case["extra"] or "-"
        if case["extra"] and not case["installed"]:
            needs = f"{case['extra']}, not installed"
        source = case["source"] or "-"
        made.add_row(case["name"], case["description"], _short(source, width), needs)
    return made


def _short(source: str, width: int) -> str:
    """A seed document's name; where room is short its number, which is enough to find it.

    >>> _short("002_bff0c980e9c9c989.txt", 80)
    '002_bff0...'
    """
    if width >= WIDE or not re.match(r"\d+_[0-9a-f]{8,}", source):
        return source
    return f"{source[:8]}..."
