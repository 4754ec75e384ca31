"""Tensors of a large model in a few rows: one for each kind, and what is wrong by itself.

A model has some hundred parameters, each with a gradient and a state. Nobody reads so many rows
that all say the same; the JSON report has every one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

MANY = 60  # so many tensors are told by kind
MOST_WRONG = 5  # of each kind that get a row of their own

Data = dict[str, Any]


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
    """What a tensor of a model is; a name of its own is its own kind."""
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
    """One row for a kind, and one for each of the first that are not as they must be."""
    if len(group) == 1:
        yield group[0]
        return
    yield _summary(kind, group)
    wrong = [tensor for tensor in group if not _is_right(tensor)]
    yield from wrong[:MOST_WRONG]


def _is_right(tensor: Data) -> bool:
    return tensor["identical"] and tensor["agrees"] and not tensor["findings"]


def _summary(kind: str, group: list[Data]) -> Data:
    """The worst of all, as if they were one tensor."""
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
    """The largest; no number is worse than any."""
    found = list(values)
    return None if None in found else max(value for value in found if value is not None)
