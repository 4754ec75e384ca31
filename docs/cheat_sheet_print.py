"""The cheat sheet as one page of A4, landscape: draw_cheat_sheet.py writes it.

Four units are one millimetre. The background is white, in the dark too: it is made for paper.
"""

from collections.abc import Iterator

import cheat_sheet as sheet
from cheat_sheet import Entry, Message, Piece
from cheat_sheet_entries import ENTRIES, RULES
from drawing import box, page, style, text, width_of, wrapped

WIDTH, HEIGHT = 1188, 840
EDGE, GAP, PAD = 28, 12, 10
COLUMNS = 3
CARD = (WIDTH - 2 * EDGE - (COLUMNS - 1) * GAP) / COLUMNS
TOP, ROWS, RULES_TOP = 58, (286, 352), 714
SIZES = {"title": 21.0, "name": 15.0, "text": 10.6, "code": 9.4, "sign": 12.0, "letter": 10.0}
LINE = 13.2
SIGNS = ("@", "=", "→")
# Width and height of a block, by the letter in it.
BLOCKS = {
    "x": (24, 16), "h": (30, 16), "y": (24, 16), "A": (30, 24), "B": (24, 30), "E": (24, 34),
    "W": (34, 24), "qkv": (34, 24), "o": (24, 30), "loss": (32, 16),
}  # fmt: skip
DESCRIPTION = (
    "Six cards (column, row, the pair, vocabulary, attention, gather), each with the code, a "
    "drawing of who has which part, the tensors of a rank with their placement and that of their "
    "gradient, what is sent forward and backward with its bytes, and three mistakes. Below them: "
    "six rules, and what a message costs. The same as text is in docs/cheat-sheet.md."
)


def shape_words(shape: tuple[str, ...]) -> str:
    """A shape as Python writes it."""
    return f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(shape)})"


def block(name: str, kind: str, x: float, middle: float) -> Iterator[str]:
    """One matrix, coloured by the two ranks that have its parts."""
    wide, high = BLOCKS[name]
    y = middle - high / 2
    if kind == "columns":
        yield box(x, y, wide / 2, high, "r0")
        yield box(x + wide / 2, y, wide / 2, high, "r1")
    elif kind == "rows":
        yield box(x, y, wide, high / 2, "r0")
        yield box(x, y + high / 2, wide, high / 2, "r1")
    elif kind == "sum":
        yield box(x - 2, y - 3, wide, high, "r0")
        yield box(x + 3, y + 3, wide, high, "r1")
    else:
        yield box(x, y, wide, high, "both")
    yield text(x + wide / 2, middle + 4, name, "letter middle")


def blocks(drawing: str, right: float, middle: float) -> Iterator[str]:
    """The little drawing of a card, up to its right edge."""
    parts = [part.partition(":") for part in drawing.split()]
    gaps = {name: 15 if name in SIGNS else BLOCKS[name][0] for name, _, _ in parts}
    x = right - sum(gaps[name] + 4 for name, _, _ in parts)
    for name, _, kind in parts:
        if name in SIGNS:
            yield text(x + gaps[name] / 2, middle + 4, name, "sign middle")
        else:
            yield from block(name, kind, x, middle)
        x += gaps[name] + 4


def gradient(piece: Piece) -> str:
    """The placement of a gradient, before and after what is done to it."""
    return " → ".join(filter(None, (piece.gradient, piece.after))) or "none"


def table(entry: Entry, x: float, y: float) -> Iterator[str]:
    """The tensors of a card."""
    places = (0, 92, 160, 234)
    head = ("a rank has", "of shape", "placement", "of its gradient")
    for place, words in zip(places, head, strict=True):
        yield text(x + place, y, words, "text bold")
    for number, piece in enumerate(entry.pieces, 1):
        row = (piece.name, shape_words(piece.shape), piece.placement, gradient(piece))
        for place, words in zip(places, row, strict=True):
            yield text(x + place, y + number * LINE, words, "text")


def message_words(message: Message) -> str:
    """One collective in a line."""
    when = f" {message.when}" if message.when else ""
    shape = shape_words(message.shape)
    return f"{message.kind} of {message.what} {shape}{when}: {sheet.formula(message)} bytes"


def sent(entry: Entry) -> Iterator[tuple[str, str]]:
    """Direction and words of each line on what is sent."""
    for direction in ("forward", "backward"):
        those = [message for message in entry.messages if message.direction == direction]
        if not those:
            yield direction, "nothing is sent"
        for message in those:
            yield direction, message_words(message)


def paragraph(
    label: str, words: str, x: float, y: float, room: float, indent: float
) -> tuple[list[str], float]:
    """A bold label and its text beside it; also where the next line begins."""
    lines = wrapped(words, SIZES["text"], room - indent)
    parts = [text(x, y, label, "text bold")] if label else []
    parts += [text(x + indent, y + i * LINE, line, "text") for i, line in enumerate(lines)]
    return parts, y + len(lines) * LINE


def card(entry: Entry, x: float, y: float, height: float) -> Iterator[str]:
    """One entry."""
    yield box(x, y, CARD, height, "bar", radius=6)
    yield text(x + PAD, y + 22, entry.name, "name bold")
    yield from blocks(entry.blocks, x + CARD - PAD, y + 24)
    line = y + 54.0
    for code in entry.code:
        indent = width_of(" " * (len(code) - len(code.lstrip())), SIZES["code"], is_mono=True)
        yield text(x + PAD + indent, line, code.lstrip(), "code mono")
        line += 12
    line += 6
    yield from table(entry, x + PAD, line)
    line += (len(entry.pieces) + 1) * LINE + 5
    room = CARD - 2 * PAD
    for direction, words in sent(entry):
        parts, line = paragraph(direction, words, x + PAD, line, room, 54)
        yield from parts
    line += 5
    yield text(x + PAD, line, "three mistakes", "text bold")
    line += LINE
    for number, mistake in enumerate(entry.mistakes, 1):
        words = f"{mistake.what} {mistake.follows}"
        parts, line = paragraph(f"{number}", words, x + PAD, line, room, 12)
        yield from parts
    if line - LINE + 4 > y + height:
        raise ValueError(f"the card {entry.name!r} needs {line - y:g} units, and has {height}.")


def foot() -> Iterator[str]:
    """Rules on the left, costs and letters on the right."""
    costs = [
        f"{kind}: {cost.replace('*', '·').replace('-', chr(0x2212))}"
        for kind, cost in sheet.COSTS.items()
    ]
    letters = ", ".join(f"{name} {words}" for name, (words, _) in sheet.LETTERS.items())
    columns = (
        [f"{rule} {why}" for rule, why in RULES[:3]],
        [f"{rule} {why}" for rule, why in RULES[3:]],
        [
            "Of a message of M bytes a rank sends: "
            + "; ".join(costs)
            + ". m: its own part. n: the "
            "nodes that it adds up itself.",
            f"{letters}, R ranks, F_r what a rank has of F, P summands of heads that ranks share. "
            "held: on other ranks too.",
        ],
    )
    for number, paragraphs in enumerate(columns):
        x, line = EDGE + number * (CARD + GAP), float(RULES_TOP + 14)
        for words in paragraphs:
            parts, line = paragraph("•", words, x, line, CARD, 10)
            yield from parts
            line += 2
        if line - LINE > HEIGHT - EDGE + 14:
            raise ValueError(f"column {number} of the rules ends at {line:g} of {HEIGHT}.")


def legend(y: float) -> Iterator[str]:
    """What the colours mean."""
    words = "overlapping: summands"
    x = WIDTH - EDGE - width_of(words, SIZES["text"])
    yield text(x, y, words, "text")
    for owner, words in (("both", "on both ranks"), ("r1", "rank 1"), ("r0", "rank 0")):
        x -= width_of(words, SIZES["text"]) + 22
        yield box(x, y - 10, 12, 12, owner)
        yield text(x + 17, y, words, "text")


def draw_print() -> str:
    """The whole page."""
    paper = "<style>@page{size:297mm 210mm;margin:0}</style>"  # where a browser prints it
    parts = [style(SIZES, with_dark=False), paper, box(0, 0, WIDTH, HEIGHT, "page")]
    parts.append(text(EDGE, 42, "Tensor parallelism: who has what, and what is sent", "title bold"))
    parts += legend(42)
    for number, entry in enumerate(ENTRIES):
        row, column = divmod(number, COLUMNS)
        y = TOP + sum(ROWS[:row]) + row * GAP
        parts += card(entry, EDGE + column * (CARD + GAP), y, ROWS[row])
    parts += foot()
    size = 'width="297mm" height="210mm"'
    return page(WIDTH, HEIGHT, "Cheat sheet of tensor parallelism", DESCRIPTION, parts, size)
