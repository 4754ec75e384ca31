"""Writes docs/cheat-sheet.md and docs/cheat-sheet.svg, a page to read and a page to print.

Both say what is in cheat_sheet_entries.py: python docs/draw_cheat_sheet.py
"""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import cheat_sheet as sheet
from cheat_sheet import Entry, Message, Mistake, Piece
from cheat_sheet_entries import ENTRIES, RULES
from cheat_sheet_print import draw_print

PAGE = Path(__file__).with_name("cheat-sheet.md")
PRINT = Path(__file__).with_name("cheat-sheet.svg")

INTRODUCTION = """<!-- written by docs/draw_cheat_sheet.py -->

# Cheat sheet

For each way to cut a layer: who has which part, what is sent, which gradient needs a sum, and the
mistakes that are easily made. [One page to print](cheat-sheet.svg) has the same without examples.
[Concepts](concepts.md) explains the words.

A test runs all of these layers at degrees 2 and 3. It compares shapes, placements, gradients, bytes
and what follows from each mistake with what this page says.
`shardproof break NAME` makes the mistakes that have a name here, and
[the gallery of mistakes](mistakes.md) shows them.

"""

COSTS = """## What a message costs

Of a message of `M` bytes a rank sends:

{table}

`m` is the rank's own part of the message. `n` is the number of nodes of the tree that the rank adds
up by itself: with 8 leaves 1, and up to 2 at degree 3. For the rows of an embedding it is 1.
In bf16 and fp16 a message has 2 bytes for each number, and a node has 4.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    head = tuple(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shape_words(shape: tuple[object, ...]) -> str:
    """A shape as Python writes it."""
    return f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"


def shapes(piece: Piece, degree: int) -> str:
    """The shapes of the example on every rank; one, if all are alike."""
    found = [shape_words(sheet.shape(piece, degree, rank)) for rank in range(degree)]
    runs = [(words, len(list(run))) for words, run in groupby(found)]
    if len(runs) == 1:
        return found[0]
    return ", ".join(f"{count} of {words}" if count > 1 else words for words, count in runs)


def gradient(piece: Piece) -> str:
    """The placement of a gradient, before and after what is done to it."""
    return " → ".join(filter(None, (piece.gradient, piece.after))) or "none"


def numbers(values: Iterable[int]) -> str:
    """Bytes of every rank; one number, if all are alike."""
    found = [f"{value:,}" for value in values]
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def message_row(message: Message) -> list[str]:
    """One collective, its bytes, and the example."""
    what = f"`{message.kind}` of {message.what}, {shape_words(message.shape)}"
    sizes = {sheet.message_bytes(message, degree) for degree in sheet.DEGREES}
    sent = [
        numbers(sheet.sent_bytes(message, degree, rank) for rank in range(degree))
        for degree in sheet.DEGREES
    ]
    return [
        message.direction,
        what + (f", {message.when}" if message.when else ""),
        sheet.formula(message),
        " or ".join(f"{size:,}" for size in sorted(sizes)),
        *sent,
    ]


def messages(entry: Entry) -> str:
    """The table of what is sent, also where nothing is."""
    rows = [message_row(message) for message in entry.messages]
    for direction in ("forward", "backward"):
        if all(row[0] != direction for row in rows):
            rows.append([direction, "nothing", "0", "0", "0", "0"])
    rows.sort(key=lambda row: row[0], reverse=True)
    head = ("", "message", "bytes in fp32", "example", "each of 2 ranks sends", "of 3 ranks")
    return table(head, rows)


def mistake_words(mistake: Mistake) -> str:
    """A mistake, and where it can be seen."""
    words = f"**{mistake.what}** {mistake.follows}"
    name = mistake.made_by
    return f"{words} [`shardproof break {name}`](mistakes.md#{name})" if name else words


def section(entry: Entry) -> str:
    """One entry of the page."""
    code = "\n".join(entry.code)
    pieces = [
        [
            f"`{piece.name}`",
            shape_words(piece.shape),
            piece.placement,
            gradient(piece),
            *(shapes(piece, degree) for degree in sheet.DEGREES),
        ]
        for piece in entry.pieces
    ]
    mistakes = [
        f"{number}. {mistake_words(mistake)}" for number, mistake in enumerate(entry.mistakes, 1)
    ]
    head = ("tensor", "on a rank", "placement", "its gradient", "with 2 ranks", "with 3 ranks")
    return "\n\n".join(
        [
            f"## {entry.name}",
            f"```text\n{code}\n```",
            entry.idea,
            table(head, pieces),
            messages(entry),
            "Three mistakes:",
            "\n".join(mistakes),
        ]
    )


def write_page() -> str:
    """The page to read."""
    rules = "\n".join(f"- **{rule}** {why}" for rule, why in RULES)
    letters = [[f"`{name}`", words, str(size)] for name, (words, size) in sheet.LETTERS.items()]
    two, three = sheet.DEGREES
    parts_of_f = [numbers(sheet.sizes("F_r", degree)) for degree in sheet.DEGREES]
    shared = [numbers(sheet.sizes("P", degree)) for degree in sheet.DEGREES]
    letters += [
        ["`R`", "ranks: the degree", f"{two} and {three}"],
        ["`F_r`", "what a rank has of `F`", " and ".join(parts_of_f)],
        ["`P`", "summands of key-value heads that ranks share", " and ".join(shared)],
    ]
    costs = [[f"`{kind}`", cost.replace("*", "·")] for kind, cost in sheet.COSTS.items()]
    parts = [
        "## Rules\n\n" + rules,
        "## Words\n\n"
        + table(("word", "means"), ([f"`{word}`", means] for word, means in sheet.WORDS)),
        "## Letters\n\n" + table(("letter", "means", "in the examples"), letters),
        *(section(entry) for entry in ENTRIES),
        COSTS.format(table=table(("collective", "bytes"), costs)).strip(),
    ]
    return INTRODUCTION + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
    PRINT.write_text(draw_print(), encoding="utf-8")
