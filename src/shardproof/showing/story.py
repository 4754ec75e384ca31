"""The scenes of a training step: what the terminal, the page and the JSON all show.

A scene is a row of the traces side by side: what the ranks do between two meetings stands in their
order, and a collective is one scene of all ranks. Steps of the prover's own are no scenes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardproof.showing.figure import Figure, Piece, figure_of
from shardproof.showing.words import changed, lying, sentences
from shardproof.trace.step import Part, Step
from shardproof.trace.text import aligned
from shardproof.trace.trace import Trace

MOST_SCENES = 300
PHASES = ("setup", "forward", "backward", "update")


@dataclass(frozen=True)
class Arrow:
    """What one rank sends in a collective.

    Attributes:
        sender: a rank.
        receivers: the ranks that get what it sends, or what is made of it.
        num_bytes: that the sender sends, to all of them together.
        carried: (name, shape) of what the sender puts in.
    """

    sender: int
    receivers: tuple[int, ...]
    num_bytes: int
    carried: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Scene:
    """One moment of all ranks.

    Attributes:
        number: counted from 1.
        phase: "forward", "backward" or "update".
        title: who does what.
        formula: what is computed, if the trace has it.
        told: sentences for a reader who sees no picture.
        is_collective: the ranks meet.
        steps: of every rank, None for one that does nothing here.
        figures: the tensors that are read, then those that are made.
        arrows: what is sent.
        held: bytes that every rank holds after it.
    """

    number: int
    phase: str
    title: str
    formula: str
    told: tuple[str, ...]
    is_collective: bool
    steps: tuple[Step | None, ...]
    figures: tuple[Figure, ...]
    arrows: tuple[Arrow, ...]
    held: tuple[int, ...]


@dataclass(frozen=True)
class Story:
    """A training step, scene by scene.

    Attributes:
        title: what was traced.
        about: sentences on it.
        degree: how many ranks.
        scenes: in order.
        num_left_out: scenes beyond the limit, by phase.
        num_dropped: of every rank, steps beyond the limit of its trace.
        has_values: numbers were kept.
    """

    title: str
    about: tuple[str, ...]
    degree: int
    scenes: tuple[Scene, ...]
    num_left_out: dict[str, int]
    num_dropped: tuple[int, ...]
    has_values: bool

    @property
    def most_held(self) -> int:
        """The most bytes that any rank holds after any scene."""
        return max((max(scene.held) for scene in self.scenes), default=0)

    @property
    def peaks(self) -> tuple[int, ...]:
        """The most bytes that each rank holds after any scene."""
        ranks = range(self.degree)
        return tuple(max((scene.held[rank] for scene in self.scenes), default=0) for rank in ranks)

    @property
    def omissions(self) -> tuple[str, ...]:
        """What is not shown, as sentences."""
        found = []
        if self.num_left_out:
            counts = ", ".join(f"{count} {phase}" for phase, count in self.num_left_out.items())
            first = len(self.scenes) + 1
            found.append(f"From step {first} on, steps are left out: {counts}.")
        if any(self.num_dropped):
            counts = ", ".join(
                f"{dropped} of rank {rank}" for rank, dropped in enumerate(self.num_dropped)
            )
            found.append(f"The trace was full, and further steps were not kept: {counts}.")
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "title": self.title,
            "about": list(self.about),
            "degree": self.degree,
            "num_left_out": self.num_left_out,
            "num_dropped": list(self.num_dropped),
            "scenes": [_scene_as_dict(scene) for scene in self.scenes],
        }


def story_of(
    trace: Trace, *, title: str, about: Sequence[str] = (), most_scenes: int = MOST_SCENES
) -> Story:
    """Make the scenes of a trace.

    Args:
        trace: of all ranks.
        title: what was traced.
        about: sentences on it.
        most_scenes: what is beyond is counted, and left out.
    """
    ranks = [[step for step in steps if step.phase in PHASES] for steps in trace.ranks]
    rows = [part for row in aligned(ranks) for part in _alike(row)]
    held = [0] * len(ranks)
    scenes = []
    for number, row in enumerate(rows[:most_scenes], 1):
        held = [
            before if step is None else step.held_bytes
            for before, step in zip(held, row, strict=True)
        ]
        scenes.append(_scene(number, row, held))
    left_out: dict[str, int] = {}
    for row in rows[most_scenes:]:
        phase = _first(row).phase
        left_out[phase] = left_out.get(phase, 0) + 1
    return Story(
        title, tuple(about), len(ranks), tuple(scenes), left_out, trace.num_dropped, trace.values
    )


def _alike(row: Sequence[Step | None]) -> Iterator[tuple[Step | None, ...]]:
    """A row as rows of steps that do the same; ranks that do different things get a row each."""
    kinds = dict.fromkeys(
        (step.phase, step.module, step.operation) for step in row if step is not None
    )
    for kind in kinds:
        yield tuple(
            step if step and (step.phase, step.module, step.operation) == kind else None
            for step in row
        )


def _scene(number: int, row: tuple[Step | None, ...], held: Sequence[int]) -> Scene:
    first = _first(row)
    figures, arrows = tuple(_figures(row)), tuple(_arrows(row))
    title = f"{first.module}: {first.operation}" if first.module else first.operation
    return Scene(
        number,
        first.phase,
        title,
        _formula(row),
        sentences(row, figures),
        first.is_collective,
        row,
        figures,
        arrows,
        tuple(held),
    )


def _formula(row: Sequence[Step | None]) -> str:
    """What is computed; where the ranks compute different nodes of a sum, the figures name them."""
    details = list(dict.fromkeys(step.detail for step in row if step and step.detail))
    if len(details) > 1:
        details = list(
            dict.fromkeys(re.sub(r", lea(f|ves) [0-9-]+$", "", text) for text in details)
        )
    return "; ".join(dict.fromkeys(details))


def _first(row: Sequence[Step | None]) -> Step:
    return next(step for step in row if step is not None)


def _figures(row: Sequence[Step | None]) -> Iterator[Figure]:
    """What the ranks read, by its place among their inputs, then what they make."""
    steps = [step for step in row if step is not None]
    most = max(len(step.inputs) for step in steps)
    pieces = [
        [Piece(step.rank, step.inputs[place]) for step in steps if place < len(step.inputs)]
        for place in range(most)
    ]
    summands = [each for each in pieces if all(p.part.placement == "Partial" for p in each)]
    if len(summands) > 1:  # the nodes of one sum, of which ranks have different numbers
        pieces = [each for each in pieces if each not in summands]
        pieces.append(sorted((p for each in summands for p in each), key=lambda p: p.rank))
    for each in pieces:
        yield figure_of(each, is_result=False)
    made = [Piece(step.rank, step.output) for step in steps if step.output is not None]
    if made:
        yield figure_of(made, is_result=True)


def _arrows(row: Sequence[Step | None]) -> Iterator[Arrow]:
    steps = [step for step in row if step is not None]
    for step in steps:
        others = tuple(
            other.rank for other in steps if other.rank != step.rank and other.output is not None
        )
        if step.is_collective and step.sent_bytes and others:
            carried = tuple((part.name, part.shape) for part in step.inputs)
            yield Arrow(step.rank, others, step.sent_bytes, carried)


def _scene_as_dict(scene: Scene) -> dict[str, Any]:
    return {
        "number": scene.number,
        "phase": scene.phase,
        "title": scene.title,
        "formula": scene.formula,
        "told": list(scene.told),
        "is_collective": scene.is_collective,
        "steps": [
            {"rank": step.rank, "number": step.number, "message_bytes": step.message_bytes}
            for step in scene.steps
            if step is not None
        ],
        "figures": [
            {
                "name": figure.name,
                "placement": figure.placement,
                "shape": list(figure.shape),
                "dtype": figure.dtype,
                "is_result": figure.is_result,
                "lies": lying(figure),
                "pieces": [_piece_as_dict(piece.rank, piece.part) for piece in figure.pieces],
            }
            for figure in scene.figures
        ],
        "arrows": [
            {
                "from": arrow.sender,
                "to": list(arrow.receivers),
                "bytes": arrow.num_bytes,
                "carried": [{"name": name, "shape": list(shape)} for name, shape in arrow.carried],
            }
            for arrow in scene.arrows
        ],
        "change": changed(scene.figures),
        "held_bytes": list(scene.held),
    }


def _piece_as_dict(rank: int, part: Part) -> dict[str, Any]:
    return {
        "rank": rank,
        "name": part.name,
        "shape": list(part.shape),
        "held": None if part.held is None else list(part.held),
        "bytes": part.num_bytes,
        "values": part.values,
        "corner": part.corner,
    }
