"""The error that all ranks raise if their calls, or the inputs of their layers, differ."""

import json
import math
from collections.abc import Callable, Sequence

import torch

from shardproof.errors import MismatchError
from shardproof.transport.base import mismatch, name_ranks
from shardproof.transport.notes import CallNotes, InputNote, differing, places_of, values_of
from shardproof.wording import dtype_name

Confer = Callable[[str], list[str]]

_SEPARATOR = "\x1f"
_NO_NOTE = "nothing"
_WAY_OUT = (
    "Give all ranks of an axis the same batch: seed samplers, shuffling, workers and random draws "
    "alike on them, not by rank. A loss of a part of the logits, a weight read by hand and a step "
    "that one rank has skipped look like this too."
)
_SWITCH = "(compare_inputs=False on the axis or in launch leaves this comparison out.)"


def disagreement(text: str, call_notes: CallNotes, confer: Confer) -> MismatchError:
    """The error that every rank raises, found by one or two more exchanges.

    Args:
        text: description of this rank's call; the first line is the call itself.
        call_notes: the notes of this rank's inputs.
        confer: function that gathers a text of every rank, in rank order.
    """
    messages = confer(_SEPARATOR.join((",".join(call_notes.hashes), text)))
    hashes, texts = [], []
    for each in messages:
        head, _, rest = each.partition(_SEPARATOR)
        hashes.append(head.split(",") if head else [])
        texts.append(rest)
    if len({each.partition("\n")[0] for each in texts}) > 1:
        return mismatch(texts)
    number = _first_difference(hashes)
    if number is None:
        return mismatch(texts)
    notes = confer(
        _described(call_notes.notes[number]) if number < len(call_notes.notes) else _NO_NOTE
    )
    return _different_inputs([None if each == _NO_NOTE else _parsed(each) for each in notes])


def _first_difference(hashes: Sequence[Sequence[str]]) -> int | None:
    for number in range(max(map(len, hashes))):
        if len({each[number] if number < len(each) else "" for each in hashes}) > 1:
            return number
    return None


def _described(note: InputNote) -> str:
    dtype = dtype_name(note.dtype)
    values = (note.who, note.what, list(note.shape), dtype, note.sample.hex(), note.whole)
    return json.dumps(values)


def _parsed(text: str) -> InputNote:
    who, what, shape, dtype, sample, whole = json.loads(text)
    return InputNote(who, what, tuple(shape), getattr(torch, dtype), bytes.fromhex(sample), whole)


def _different_inputs(notes: Sequence[InputNote | None]) -> MismatchError:
    """One sentence about the first two ranks that differ, and what to do."""
    first = notes[0]
    other = next(rank for rank, note in enumerate(notes) if note != first)
    second = notes[other]
    any_note = first or second
    what = f"{any_note.what} of {any_note.who!r}" if any_note is not None else "input"
    if first is None or second is None or (first.who, first.what) != (second.who, second.what):
        difference = f"rank 0 has {_owner(first)}, rank {other} has {_owner(second)}"
        return MismatchError(
            f"the ranks did not give the same inputs to the same layers: {difference}. Every rank "
            f"of an axis must call the same layers in the same order. {_SWITCH}"
        )
    return MismatchError(
        f"the ranks disagree about the {what}, which must be the same on all ranks of the axis: "
        f"{_contrast(first, second, other)}{_alike(notes)}. {_WAY_OUT} {_SWITCH}"
    )


def _owner(note: InputNote | None) -> str:
    return "none" if note is None else f"the {note.what} of {note.who!r}"


def _contrast(first: InputNote, second: InputNote, rank: int) -> str:
    """The difference between the tensors of rank 0 and of another rank."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return f"rank 0 has {_kind(first)}, rank {rank} has {_kind(second)}"
    number = differing(first.shape, first.dtype, first.sample, second.sample)
    if number is None:
        return (
            f"rank 0 and rank {rank} have {_kind(first)} with different elements, none of them "
            "among those that are shown"
        )
    values = [values_of(note.dtype, note.sample)[number] for note in (first, second)]
    place = _unravelled(places_of(math.prod(first.shape))[number], first.shape)
    at = f" at {list(place)}" if place else ""
    return f"of {_kind(first)}, rank 0 has {values[0]!r}{at}, rank {rank} has {values[1]!r}"


def _alike(notes: Sequence[InputNote | None]) -> str:
    """The other ranks that have the same tensor as rank 0, if there are any."""
    alike = [rank for rank, note in enumerate(notes) if rank and note == notes[0]]
    if not alike:
        return ""
    return f" ({name_ranks(alike)} {'have' if len(alike) > 1 else 'has'} what rank 0 has)"


def _kind(note: InputNote) -> str:
    return f"{str(note.dtype).removeprefix('torch.')} {note.shape}"


def _unravelled(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        index.append(place % size)
        place //= size
    return tuple(reversed(index))
