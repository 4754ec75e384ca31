"""What travels in a collective: an arrow for each sender and receiver, and the same in words."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from shardproof.observing import Sending
from shardproof.showing.grids import flat, writer_of
from shardproof.showing.moments import Moment
from shardproof.showing.words import DIMS, ranks
from shardproof.trace.step import Part

FEW = 6  # numbers that are written beside what travels
MOST_ARROWS = 4  # ranks, beyond which what a rank sends in a stage is one line
STAGES = (
    "Each rank sends a slice of its parts to the rank that adds this slice.",
    "Each finished slice goes to all other ranks.",
)


@dataclass(frozen=True)
class Cargo:
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
        cargo: what travels.
    """

    sender: int
    receiver: int
    stage: int
    cargo: tuple[Cargo, ...]

    @property
    def num_bytes(self) -> int:
        """All that travels."""
        return sum(each.num_bytes for each in self.cargo)


def arrows_of(row: Sequence[Moment | None]) -> tuple[Arrow, ...]:
    """The arrows of a collective, those of the first stage first.

    Empty if nothing is sent, or if the transport decides what goes to whom.
    """
    moments = [moment for moment in row if moment is not None and moment.first.is_collective]
    found = [
        Arrow(
            moment.first.rank,
            receiver,
            stage=stage,
            cargo=tuple(_cargo(each, moment) for each in sends),
        )
        for moment in moments
        for (stage, receiver), sends in _sorted(moment.first.sends)
    ]
    return tuple(sorted(found, key=lambda arrow: (arrow.stage, arrow.sender, arrow.receiver)))


def told_arrows(
    arrows: Sequence[Arrow], *, is_brief: bool = False, has_numbers: bool = True
) -> Iterator[tuple[Arrow, str]]:
    """What every rank sends, in words, with the first arrow that is meant.

    Args:
        arrows: of one collective.
        is_brief: what a rank sends in a stage is one line, whoever gets it.
        has_numbers: with the numbers that travel, where they are known and few.
    """
    for (_, _), alike in groupby(arrows, key=lambda arrow: (arrow.stage, arrow.sender)):
        of_sender = list(alike)
        sets = {arrow.cargo for arrow in of_sender}
        if is_brief and len(sets) > 1:
            names = " and ".join(each.name for each in of_sender[0].cargo)
            size = sum(arrow.num_bytes for arrow in of_sender)
            to = ranks([arrow.receiver for arrow in of_sender])
            yield of_sender[0], f"{to}: to each its slice of {names}, {size:,} bytes in all"
            continue
        for cargo, same in groupby(of_sender, key=lambda arrow: arrow.cargo):
            found = list(same)
            to = ranks([arrow.receiver for arrow in found])
            each = " to each" if len(found) > 1 else ""
            size = found[0].num_bytes
            what = _written(cargo, found[0].stage, has_numbers)
            yield found[0], f"{to}: {what}, {size:,} bytes{each}"


def _written(cargo: Sequence[Cargo], stage: int, has_numbers: bool) -> str:
    finished = "the finished sum of " if stage == 2 else ""
    if not has_numbers:
        cargo = [replace(each, numbers=()) for each in cargo]
    if cargo[0].piece:
        names = " and ".join(each.name + _numbers(each) for each in cargo)
        return f"{cargo[0].piece} of {finished}{names}"
    return finished + " and ".join(f"{each.name} {each.shape}{_numbers(each)}" for each in cargo)


def _numbers(cargo: Cargo) -> str:
    return f" [{', '.join(cargo.numbers)}]" if cargo.numbers else ""


def _sorted(sends: Sequence[Sending]) -> Iterator[tuple[tuple[int, int], list[Sending]]]:
    def key(each: Sending) -> tuple[int, int]:
        return (2 if each.source is None else 1), each.receiver

    for stage, alike in groupby(sorted(sends, key=key), key=key):
        yield stage, list(alike)


def _cargo(sending: Sending, moment: Moment) -> Cargo:
    """One piece, from what the rank gave or, of a finished sum, from what all have got."""
    part = moment.outputs[0] if sending.source is None else moment.inputs[sending.source]
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
    return Cargo(part.name, piece, shape=shape, num_bytes=sending.num_bytes, numbers=numbers)


def _span(what: str, start: int, stop: int) -> str:
    if stop - start > 1:
        return f"{what} {start}-{stop - 1}"
    single = "index" + what[7:] if what.startswith("indices") else what[:-1]
    return f"{single} {start}"


def _few(part: Part, sending: Sending) -> tuple[str, ...]:
    """The numbers that travel, if they are known and few, as they are drawn."""
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
