"""What travels in a collective: an arrow for each sender and receiver, and the same in words."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from shardproof.observing import Sending
from shardproof.showing.actions import RankAction
from shardproof.showing.sentences import DIMS, ranks
from shardproof.showing.tensors import flat, writer_of
from shardproof.trace.step import Part

FEW = 6  # numbers that are written beside what travels
MOST_ARROWS = 4  # ranks, beyond which what a rank sends in a stage is one line
STAGES = (
    "Each rank sends a slice of its parts to the rank that adds this slice.",
    "Each finished slice goes to all other ranks.",
)


@dataclass(frozen=True)
class SentPiece:
    """A piece of one tensor that travels.

    Attributes:
        name: of the tensor.
        piece: which piece of it, in words; "" for the whole.
        shape: of what travels.
        num_bytes: of what travels.
        numbers: of what travels, as text; empty if they are not known or many.
    """

    name: str
    piece: str
    shape: tuple[int, ...]
    num_bytes: int
    numbers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrow:
    """What one rank sends to one other.

    Attributes:
        sender: a rank.
        receiver: another.
        stage: 1; 2 for what an all-reduce sends when its slices are finished.
        sent_pieces: what travels.
    """

    sender: int
    receiver: int
    stage: int
    sent_pieces: tuple[SentPiece, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of all pieces."""
        return sum(each.num_bytes for each in self.sent_pieces)


def arrows_of(row: Sequence[RankAction | None]) -> tuple[Arrow, ...]:
    """The arrows of a collective, those of the first stage first.

    Empty if nothing is sent, or if the transport decides what goes to whom.
    """
    actions = [action for action in row if action is not None and action.first.is_collective]
    arrows = [
        Arrow(
            action.first.rank,
            receiver,
            stage=stage,
            sent_pieces=tuple(_sent_piece(each, action) for each in sends),
        )
        for action in actions
        for (stage, receiver), sends in _sorted(action.first.sends)
    ]
    return tuple(sorted(arrows, key=lambda arrow: (arrow.stage, arrow.sender, arrow.receiver)))


def arrow_sentences(
    arrows: Sequence[Arrow], *, is_brief: bool = False, has_numbers: bool = True
) -> Iterator[tuple[Arrow, str]]:
    """What every rank sends, in words, with the first of the arrows that each sentence describes.

    Args:
        arrows: of one collective.
        is_brief: what a rank sends in a stage is one line, whoever gets it.
        has_numbers: with the numbers that travel, where they are known and few.
    """
    for (_, _), alike in groupby(arrows, key=lambda arrow: (arrow.stage, arrow.sender)):
        of_sender = list(alike)
        sets = {arrow.sent_pieces for arrow in of_sender}
        if is_brief and len(sets) > 1:
            names = " and ".join(each.name for each in of_sender[0].sent_pieces)
            size = sum(arrow.num_bytes for arrow in of_sender)
            to = ranks([arrow.receiver for arrow in of_sender])
            yield of_sender[0], f"{to}: to each its slice of {names}, {size:,} bytes in all"
            continue
        for sent_pieces, same in groupby(of_sender, key=lambda arrow: arrow.sent_pieces):
            group = list(same)
            to = ranks([arrow.receiver for arrow in group])
            each = " to each" if len(group) > 1 else ""
            size = group[0].num_bytes
            what = _written(sent_pieces, group[0].stage, has_numbers)
            yield group[0], f"{to}: {what}, {size:,} bytes{each}"


def _written(sent_pieces: Sequence[SentPiece], stage: int, has_numbers: bool) -> str:
    finished = "the finished sum of " if stage == 2 else ""
    if not has_numbers:
        sent_pieces = [replace(each, numbers=()) for each in sent_pieces]
    if sent_pieces[0].piece:
        names = " and ".join(each.name + _numbers(each) for each in sent_pieces)
        return f"{sent_pieces[0].piece} of {finished}{names}"
    return finished + " and ".join(
        f"{each.name} {each.shape}{_numbers(each)}" for each in sent_pieces
    )


def _numbers(sent_pieces: SentPiece) -> str:
    return f" [{', '.join(sent_pieces.numbers)}]" if sent_pieces.numbers else ""


def _sorted(sends: Sequence[Sending]) -> Iterator[tuple[tuple[int, int], list[Sending]]]:
    def key(each: Sending) -> tuple[int, int]:
        return (2 if each.source is None else 1), each.receiver

    for stage, alike in groupby(sorted(sends, key=key), key=key):
        yield stage, list(alike)


def _sent_piece(sending: Sending, action: RankAction) -> SentPiece:
    """The piece that is sent, cut from an input or, of a finished sum, from the result."""
    part = action.outputs[0] if sending.source is None else action.inputs[sending.source]
    start, stop, dim = sending.start, sending.stop, sending.dim
    length = stop - start
    size = math.prod(part.shape) if dim is None else part.shape[dim]
    if length == size:
        piece, shape = "", part.shape
    elif dim is None:
        piece, shape = f"{_span('elements', start, stop)}", (length,)
    else:
        what = DIMS.get(len(part.shape) - dim) or f"indices of dim {dim}"
        piece, shape = _span(what, start, stop), (*part.shape[:dim], length, *part.shape[dim + 1 :])
    numbers = _few(part, sending)
    return SentPiece(part.name, piece, shape=shape, num_bytes=sending.num_bytes, numbers=numbers)


def _span(what: str, start: int, stop: int) -> str:
    if stop - start > 1:
        return f"{what} {start}-{stop - 1}"
    single = "index" + what[7:] if what.startswith("indices") else what[:-1]
    return f"{single} {start}"


def _few(part: Part, sending: Sending) -> tuple[str, ...]:
    """The numbers that are sent, if they are known and few."""
    if part.values is None:
        return ()
    numbers, dim = list(flat(part.values)), sending.dim
    if dim is None:
        numbers = numbers[sending.start : sending.stop]
    else:
        inner, size = math.prod(part.shape[dim + 1 :]), part.shape[dim]
        here = range(sending.start, sending.stop)
        numbers = [x for at, x in enumerate(numbers) if at // inner % size in here]
    if len(numbers) > FEW:
        return ()
    write = writer_of([part])
    return tuple(write.number(number) for number in numbers)
