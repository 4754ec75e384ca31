"""The tensors of a report as a table: their differences from plain PyTorch, and their hashes.

A model has some hundred parameters, each with a gradient and a state. Where a case has many
tensors, those of one kind share a row, and those that differ have rows of their own. The JSON
report has every tensor.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from shardproof.cli.output import BAD, GOOD, WIDE, listed, shape, small, table, yes_no

HASH_LENGTH = 8
NAME_ROOM = 24  # for a tensor's name where the table has to save room
NAME_LINE = 21  # of a longer one, which is broken
MANY_LATER = 12  # so many tensors of later steps are a line, not rows
MOST_DIFFERING = 5  # of them that are shown where bits differ
MANY = 60  # so many tensors are shown by kind
MOST_WRONG = 5  # of each kind that get a row of their own

Data = dict[str, Any]


def tensor_table(tensors: Sequence[Data], *, width: int) -> Table:
    """One row per tensor: the comparison with plain PyTorch, then the degrees among each other.

    Args:
        tensors: as a report has them, or kinds of them with a count.
        width: of the line.
    """
    is_wide = width >= WIDE
    grid = table(
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
    for column in grid.columns[1:-1]:
        column.no_wrap = True
    for tensor in tensors:
        hashes, same = _bits(tensor, line_break=" " if is_wide else "\n")
        name = tensor["name"] if is_wide else _broken(tensor["name"])
        what = f"{tensor['count']} tensors" if "count" in tensor else shape(tensor["shape"])
        grid.add_row(name, what, *_torch_cells(tensor), hashes, same)
    return grid


def _broken(name: str) -> str:
    """A long name with line breaks at dots.

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
        hash_text = next(iter(hashes.values()))[:HASH_LENGTH]
    else:
        hash_text = "\n".join(f"{degree} {sha[:HASH_LENGTH]}" for degree, sha in hashes.items())
    if tensor["identical"]:
        return hash_text, yes_no(True)
    others = ", ".join(differing_degrees(tensor))
    return hash_text, Text(f"NO:{line_break}{others}" if others else "NO", BAD)


def differing_degrees(tensor: Data) -> list[str]:
    """The degrees at which a tensor has other bits than at the first degree.

    >>> differing_degrees({"sha256": {"1": "aa", "2": "aa", "3": "bb"}})
    ['3']
    """
    first, *others = tensor["sha256"] or [""]
    return [degree for degree in others if tensor["sha256"][degree] != tensor["sha256"][first]]


def split_later(tensors: Sequence[Data]) -> tuple[list[Data], list[Data]]:
    """Split tensors into those with a row each, and later steps that share one line.

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
    each = listed(f"each of {len(numbers)} {period}s" for period, numbers in periods.items())
    what = f"recorded after {each or 'the first step'} ({len(later)} tensors)"
    differing = [tensor for tensor in later if not tensor["identical"]]
    if not differing:
        return Text(f"{what}: ") + Text("the same at every degree", GOOD)
    verdict = f"{len(differing)} differ, the first is {differing[0]['name']}"
    return Text(f"{what}: ") + Text(verdict, BAD)


def condense(tensors: Sequence[Data]) -> list[Data]:
    """The rows to show: all tensors, or kinds of them where they are many.

    Args:
        tensors: as a report has them.

    Returns:
        Tensors, and kinds: as tensors, with "count", and without a hash where there are several.
    """
    if len(tensors) <= MANY:
        return list(tensors)
    names = {tensor["name"] for tensor in tensors}
    kinds: dict[str, list[Data]] = {}
    for tensor in tensors:
        kinds.setdefault(_kind(tensor["name"], names), []).append(tensor)
    return [row for kind, group in kinds.items() for row in _rows(kind, group)]


def _kind(name: str, names: set[str]) -> str:
    """The kind of a tensor of a model: weights, gradients, state, or its own name."""
    run, colon, tail = name.rpartition(": ")
    if name.endswith(" (initial)"):
        return "initial weights"
    if "." not in tail:
        return name
    what = "optimizer state"
    if tail.endswith(".grad"):
        what = "gradients"
    elif f"{tail} (initial)" in names:
        what = "weights"
    return f"{run}{colon}{what}"


def _rows(kind: str, group: list[Data]) -> Iterator[Data]:
    """One row for a kind, and one for each of its first wrong tensors."""
    if len(group) == 1:
        yield group[0]
        return
    yield _summary(kind, group)
    wrong = [tensor for tensor in group if not _is_right(tensor)]
    yield from wrong[:MOST_WRONG]


def _is_right(tensor: Data) -> bool:
    return tensor["identical"] and tensor["agrees"] and not tensor["findings"]


def _summary(kind: str, group: list[Data]) -> Data:
    """The worst values of a group, as one row."""
    torch = [tensor["torch"] for tensor in group]
    is_known = None not in torch
    fp64 = [tensor["fp64"] for tensor in group if tensor["fp64"]]
    return {
        "name": kind,
        "count": len(group),
        "identical": all(tensor["identical"] for tensor in group),
        "agrees": all(tensor["agrees"] for tensor in group),
        "agreement_judged": any(tensor["agreement_judged"] for tensor in group),
        "torch": {
            "exact": all(each["exact"] for each in torch),
            "max_abs_diff": _largest(each["max_abs_diff"] for each in torch),
        }
        if is_known
        else None,
        "fp64": {side: _largest(each[side] for each in fp64) for side in ("ours", "torch")}
        if fp64
        else None,
        "sha256": {},
    }


def _largest(values: Iterable[float | None]) -> float | None:
    """The largest value; None if any is missing."""
    numbers = list(values)
    return None if None in numbers else max(value for value in numbers if value is not None)
