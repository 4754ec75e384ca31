"""docs/zoo.md: what the step `prove` found of every model, as tables."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from zoo.lists import names
from zoo.unbuildable import UNBUILDABLE

Row = dict[str, Any]
SHARE = 0.9
ORDER = ("causal", "seq2seq", "masked", "image", "own")
_TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Sequence-to-sequence models",
    "masked": "Masked language models",
    "image": "Image classifiers",
    "own": "Models of one's own",
}
_START = """# The zoo

`make zoo` goes through every class of four lists of transformers {transformers}, and through
models that are written in plain torch. Each is built in a small configuration (some 6 heads, 2
key-value heads, feed-forward 100, vocabulary 251: sizes that divide nothing), planned by watching
one forward, cut, and trained one step at degrees 1, 2 and 3 with invariant numerics. This page is
written by that run. No rule of shardproof names a model or a class.

- *cut*: the part of the elements of parameters with two dims or more that is cut.
- *sums*: all-reduces of a step at degree 2, forward + backward. Two for each pair of layers and
  direction are what a Megatron block has.
- *gathers*: all-gathers forward + backward. One forward is the loss of a cut vocabulary.
- *inside*: operations that cannot be done on parts, so their operands were gathered.
- *same bits*: loss, every gradient and every updated weight have the same hash at degrees 1, 2, 3.
- *error*: the largest difference of loss, gradients and weights from plain torch in fp64, relative.
"""


def page(rows: Sequence[Row], transformers: str) -> str:
    """The page as text.

    Args:
        rows: of the step `prove`.
        transformers: the version.
    """
    by_name = {row["name"]: row for row in rows if row["step"] == "prove"}
    lines = [_START.format(transformers=transformers), *_summary(by_name)]
    lines += [f"torch {torch.__version__.partition('+')[0]}.", ""]
    for which in ORDER:
        found = [by_name[name] for name in sorted(names(which)) if name in by_name]
        if found:
            lines += [f"## {_TITLES[which]}", "", *_table(found), ""]
    return "\n".join(lines).rstrip() + "\n"


def _summary(by_name: dict[str, Row]) -> Iterable[str]:
    yield "| list | classes | run by plain torch | at least 0.9 cut | same bits and within 1e-9 |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for which in ORDER:
        found = [by_name[name] for name in names(which) if name in by_name]
        plain = [row for row in found if row["name"] not in UNBUILDABLE]
        cut = [row for row in plain if row.get("share", 0) >= SHARE]
        proved = [row for row in cut if row.get("is_same") and row.get("error", 1) <= 1e-9]
        counts = " | ".join(str(len(each)) for each in (found, plain, cut, proved))
        yield f"| {_TITLES[which]} | {counts} |"
    yield ""


def _table(rows: Sequence[Row]) -> Iterable[str]:
    yield "| model | cut | sums | gathers | inside | same bits | error | why not |"
    yield "| --- | ---: | ---: | ---: | --- | --- | ---: | --- |"
    for row in rows:
        yield "| " + " | ".join([row["name"], *_cells(row), _reason(row)]) + " |"


def _cells(row: Row) -> list[str]:
    if "share" not in row:
        return [""] * 6
    if "forward" not in row:
        return [f"{row['share']:.3f}", *[""] * 5]
    sums, gathers = (
        f"{row['forward'].get(kind, 0)} + {row['backward'].get(kind, 0)}"
        for kind in ("all_reduce", "all_gather")
    )
    inside = ", ".join(sorted({key.partition(" ")[0] for key in row["gathered"]}))
    same = "yes" if row["is_same"] else "no"
    return [f"{row['share']:.3f}", sums, gathers, inside, same, f"{row['error']:.0e}"]


def _reason(row: Row) -> str:
    reason = UNBUILDABLE.get(row["name"]) or row.get("reason", "")
    return " ".join(reason.replace("|", "/").split())[:200]
