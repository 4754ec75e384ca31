"""The form of the cheat sheet: tensors, messages, mistakes, and their sizes in one example.

A size is a letter. `F_r` is what one rank has of `F`, and `F_r·D` is a product.
What the sheet says is in `cheat_sheet_entries.py`; tests/test_cheat_sheet.py compares both with
runs of the layers.
"""

from dataclasses import dataclass
from math import prod

from shardproof.heads import Heads
from shardproof.leaves import DEFAULT_LEAVES, Cut
from shardproof.tree import nodes_of_run

BATCH, LENGTH = 2, 3
LETTERS = {
    "T": ("tokens of the batch", BATCH * LENGTH),
    "H": ("width of the model", 48),
    "F": ("width inside a feed-forward block", 80),
    "V": ("tokens of the vocabulary", 50),
    "Q": ("query heads", 4),
    "K": ("key-value heads", 2),
    "D": ("features of a head", 12),
    "L": ("leaves of the plan", DEFAULT_LEAVES),
}
WORDS = (
    ("f", "The identity forward, an all_reduce of the gradient backward: before a column layer."),
    ("g", "An all_reduce forward, the identity backward: after a row layer."),
    ("leaf", "A run of neighbours in a cut dim, such as 10 of 80 features. No leaf is ever cut."),
    ("node", "The sum of neighbouring leaves that a rank has added up: what it sends of a sum."),
    ("held", "A rank has a copy of what another rank has, too: a key-value head that both need."),
)
SIZES = {letter: size for letter, (_, size) in LETTERS.items()}
DEGREES = (2, 3)
BYTES = 4  # of a number in fp32

Shape = tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """A tensor as one rank has it.

    Attributes:
        name: as the sheet calls it.
        shape: on one rank.
        placement: how it lies on the ranks.
        gradient: the placement of its gradient, as backward finds it; "" if it has none.
        after: the placement once a collective has passed, if one does.
    """

    name: str
    shape: Shape
    placement: str
    gradient: str
    after: str = ""


@dataclass(frozen=True)
class Message:
    """One collective.

    Attributes:
        direction: "forward" or "backward".
        kind: the collective.
        what: is sent.
        shape: of what every rank has together.
        over: the letter of the dim that was summed over, if leaves are added.
        along: the letter of the dim along which parts are joined or kept.
        when: it is sent only then.
    """

    direction: str
    kind: str
    what: str
    shape: Shape
    over: str = ""
    along: str = ""
    when: str = ""


@dataclass(frozen=True)
class Mistake:
    """What is easily done wrong, and what comes of it.

    Attributes:
        key: by which a test knows it.
        what: is done.
        follows: from it.
        made_by: its name for `shardproof break`; "" if the gallery does not have it.
    """

    key: str
    what: str
    follows: str
    made_by: str = ""


@dataclass(frozen=True)
class Entry:
    """One thing that can be cut.

    Attributes:
        name: of it.
        code: how it is made.
        idea: one sentence on who has what.
        blocks: the little drawing: signs, and matrices as "name:how it is cut".
        pieces: tensors of a rank.
        messages: in the order of a step.
        mistakes: the three that it invites.
    """

    name: str
    code: tuple[str, ...]
    idea: str
    blocks: str
    pieces: tuple[Piece, ...]
    messages: tuple[Message, ...]
    mistakes: tuple[Mistake, Mistake, Mistake]


# What one rank sends of a message of M bytes in all: m bytes are its own part of it, and n is the
# number of nodes of the tree that it adds up by itself.
COSTS = {
    "all_reduce": "(n + 1) * (R - 1) / R * M",
    "all_gather": "(R - 1) * m",
    "reduce_scatter": "n * (M - m)",
}


def heads(degree: int) -> Heads:
    """Who has which heads in the example."""
    return Heads(SIZES["Q"], SIZES["K"], SIZES["D"], DEFAULT_LEAVES, degree)


def cut(letter: str, degree: int) -> Cut:
    """How the dim of a letter is cut in the example; query heads are cut as heads."""
    if letter == "Q":
        return heads(degree).query_cut
    return Cut(SIZES[letter], DEFAULT_LEAVES, degree)


def size(symbol: str, degree: int, rank: int) -> int:
    """A size in the example: a number, a letter, a rank's part of one, or a product of these."""
    return prod(_factor(factor, degree, rank) for factor in symbol.split("·"))


def sizes(symbol: str, degree: int) -> list[int]:
    """A size in the example on every rank."""
    return [size(symbol, degree, rank) for rank in range(degree)]


def _factor(symbol: str, degree: int, rank: int) -> int:
    letter, _, is_part = symbol.partition("_")
    if symbol.isdigit():
        return int(symbol)
    if letter == "P":  # parts of key-value heads that ranks share
        ranks = [rank] if is_part else range(degree)
        return sum(_parts(degree, each) for each in ranks)
    if not is_part:
        return SIZES[letter]
    if letter == "Q":
        return len(heads(degree).owned(rank))
    if letter == "K":
        return len(heads(degree).held(rank))
    return len(cut(letter, degree).owned(rank))


def _parts(degree: int, rank: int) -> int:
    those = heads(degree)
    return sum(len(nodes_of_run(those.group, those.served(key, rank))) for key in those.shared())


def shape(piece: Piece, degree: int, rank: int) -> tuple[int, ...]:
    """Of a tensor on one rank in the example."""
    return tuple(size(symbol, degree, rank) for symbol in piece.shape)


def message_bytes(message: Message, degree: int) -> int:
    """Of a whole message in the example."""
    return BYTES * prod(size(symbol, degree, 0) for symbol in message.shape)


def sent_bytes(message: Message, degree: int, rank: int) -> int:
    """What one rank sends for a message in the example."""
    whole = message_bytes(message, degree)
    nodes = 1
    if message.over:
        those = cut(message.over, degree)
        nodes = len(nodes_of_run(those.num_leaves, those.run(rank)))
    own = 0
    if message.along:
        total = size(message.along, degree, rank)
        own = whole * size(f"{message.along}_r", degree, rank) // total if total else 0
    names = {"R": degree, "M": whole, "m": own, "n": nodes}
    return round(eval(COSTS[message.kind], {"__builtins__": {}}, names))


def formula(message: Message) -> str:
    """Bytes of a message: numbers first, then letters."""
    numbers = [int(symbol) for symbol in message.shape if symbol.isdigit()]
    letters = [symbol for symbol in message.shape if not symbol.isdigit()]
    return "·".join([str(BYTES * prod(numbers)), *letters])
