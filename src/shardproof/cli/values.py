"""`prove --show`: the numbers of a case, and what its notebook prints beside what we have."""

from collections.abc import Iterator
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from shardproof.cli.output import BAD, PlainConsole, shape, table

INDENT = 1
WIDTH = 10  # of one number

Data = dict[str, Any]


def show_values(case: Data, out: PlainConsole) -> None:
    """Print the small tensors of a case, and its notebook's results beside ours.

    Args:
        case: as a report has it, made with values.
        out: where to.
    """
    shown = [tensor for tensor in case["tensors"] if tensor.get("shown")]
    for tensor in shown:
        out.show(Padding(_values(tensor, room=out.width - INDENT), (0, 0, 0, INDENT)))
    if shown:
        out.print()
    if case.get("notebook"):
        out.show(Padding(_beside(case, width=out.width - INDENT), (0, 0, 0, INDENT)))
        out.print()


def _values(tensor: Data, *, room: int) -> Text:
    shown = tensor["shown"]
    held = {degree: _held(shapes) for degree, shapes in shown["held"].items()}
    where = "; ".join(f"degree {degree}: {text}" for degree, text in held.items())
    whose = "" if tensor["identical"] else f"; the numbers of degree {shown['degree']}"
    head = f"{tensor['name']} ({shape(tensor['shape'])}; a rank holds, at {where}{whose})"
    if shown["ours"] is None:
        return Text(f"{head}: too large to show")
    return Text("\n".join([head, *_lines(shown["ours"], max(1, room // WIDTH))]))


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
        yield f"{numbers:{WIDTH}.4f}"
        return
    if numbers and isinstance(numbers[0], list | tuple):
        for row in numbers:
            yield from _lines(row, room)
        return
    for start in range(0, len(numbers), room):
        yield "".join(f"{number:{WIDTH}.4f}" for number in numbers[start : start + room])


def _beside(case: Data, *, width: int) -> Table:
    made = table("notebook prints", "what", "notebook", "ours", width=width)
    for row in case["notebook"]:
        section = f"{row['section']}: " if row["section"] else ""
        ours = Text(row["ours"], BAD if row["same"] is False else "")
        made.add_row(f"{section}{row['label']}", row["what"], row["notebook"], ours)
    return made
