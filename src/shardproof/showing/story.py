"""The scenes of a training step: what the terminal, the page and the JSON all show.

A scene is a row of the traces side by side: what the ranks do between two meetings stands in their
order, and a collective is one scene of all ranks. Steps of the prover's own are no scenes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardproof.comm.reporting import FREE_ORDER
from shardproof.showing.figure import Figure, Piece, figure_of
from shardproof.showing.moments import Moment, base_name, moments_of
from shardproof.showing.sends import Arrow, arrows_of
from shardproof.showing.words import CUT_AGAIN, changed, lying, sentences
from shardproof.trace.step import Part, Step
from shardproof.trace.text import aligned
from shardproof.trace.trace import Trace
from shardproof.tree import node_name

MOST_SCENES = 300
PHASES = ("setup", "forward", "backward", "update")

Row = tuple[Moment | None, ...]

# `grad` is the one number that comes from the step before.
_LOSS_BACKWARD = {"mse_loss": "grad_y = 2 * (y - target) * grad"}


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
        moments: of every rank, None for one that does nothing here.
        figures: the tensors that are read, then those that are made.
        arrows: what is sent to whom; none if the transport decides that.
        held: bytes that every rank holds after it.
    """

    number: int
    phase: str
    title: str
    formula: str
    told: tuple[str, ...]
    is_collective: bool
    moments: tuple[Moment | None, ...]
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
    rows = _rows(trace)
    held = [0] * len(trace.ranks)
    scenes: list[Scene] = []
    known = _Known()
    for number, row in enumerate(rows[:most_scenes], 1):
        held = [
            before if moment is None else moment.held_bytes
            for before, moment in zip(held, row, strict=True)
        ]
        scenes.append(_scene(number, row, held=held, known=known))
    left_out: dict[str, int] = {}
    for row in rows[most_scenes:]:
        phase = _first(row).first.phase
        left_out[phase] = left_out.get(phase, 0) + 1
    return Story(
        title,
        tuple(about),
        degree=len(trace.ranks),
        scenes=tuple(scenes),
        num_left_out=left_out,
        num_dropped=trace.num_dropped,
        has_values=trace.values,
    )


def _rows(trace: Trace) -> list[Row]:
    """What the ranks do side by side, a scene each."""
    ranks = [moments_of([step for step in steps if step.phase in PHASES]) for steps in trace.ranks]
    found = {(m.first.rank, m.first.number): m for moments in ranks for m in moments}
    rows = aligned([[moment.first for moment in moments] for moments in ranks])
    return [
        tuple(None if step is None else found[step.rank, step.number] for step in part)
        for row in rows
        for part in _alike(row)
    ]


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


class _Known:
    """What earlier scenes have shown, and later ones refer to.

    Attributes:
        gathered: modules whose output was gathered in forward.
        target: of the last loss.
    """

    def __init__(self) -> None:
        self.gathered: set[str] = set()
        self.target: Figure | None = None

    def learn(self, first: Moment, figures: Sequence[Figure]) -> None:
        """Keep what a scene of the forward has."""
        step = first.first
        if step.phase != "forward":
            return
        is_output = any(figure.is_result and figure.name == "y" for figure in figures)
        if step.operation == "all_gather" and is_output:
            self.gathered.add(step.module)
        if step.operation == "loss":
            self.target = next((f for f in figures if f.name == "target"), None)

    def cut_again(self, step: Step) -> str:
        """A sentence, where a rank takes its columns of the gradient of what was gathered."""
        if step.phase != "backward" or step.module not in self.gathered or not step.inputs:
            return ""
        given = step.inputs[0]
        if step.operation != "product" or not given.placement.startswith("Shard"):
            return ""
        self.gathered.remove(step.module)
        return CUT_AGAIN.format(name=given.name)


def _scene(number: int, row: Row, *, held: Sequence[int], known: _Known) -> Scene:
    moment = _first(row)
    first = moment.first
    figures = tuple(_figures(row))
    known.learn(moment, figures)
    if first.operation == "loss" and first.phase == "backward" and known.target is not None:
        figures = (figures[0], known.target, *figures[1:])
    return Scene(
        number=number,
        phase=first.phase,
        title=f"{first.module}: {first.operation}" if first.module else first.operation,
        formula=_formula(row),
        told=sentences(row, figures, first=known.cut_again(first)),
        is_collective=first.is_collective,
        moments=row,
        figures=figures,
        arrows=arrows_of(row),
        held=tuple(held),
    )


def _formula(row: Row) -> str:
    """What is computed; of the products of nodes, for which leaves."""
    return "; ".join(dict.fromkeys(filter(None, (_formula_of(m, row) for m in row if m))))


def _formula_of(moment: Moment, row: Row) -> str:
    step, name = moment.first, _result_name(moment)
    if step.is_collective:
        added = moment.addition
        of = "the sum of " if added == FREE_ORDER else ""
        return f"{name} = {of}{added}" if added and name else ""
    if step.operation == "loss" and step.phase == "backward":
        return _LOSS_BACKWARD.get(step.module, step.detail)
    if step.rule:
        return f"{step.rule} ({step.detail})"
    if moment.addition:
        return f"{step.detail}, added as {moment.addition}"
    node = step.output.node if step.output is not None else None
    if node is None:
        return step.detail
    nodes = sorted({p.node for other in row if other for p in other.outputs if p.node is not None})
    plain = step.detail.removesuffix(f", {node_name(node)}")
    return f"{plain} for each of: {', '.join(map(node_name, nodes))}"


def _result_name(moment: Moment) -> str:
    return moment.outputs[0].name if moment.outputs else ""


def _first(row: Row) -> Moment:
    return next(moment for moment in row if moment is not None)


def _figures(row: Row) -> Iterator[Figure]:
    """What the ranks read, by its place among their inputs, then what they make."""
    moments = [moment for moment in row if moment is not None]
    most = max(len(moment.inputs) for moment in moments)
    nodes: list[Piece] = []
    for place in range(most):
        given = [
            Piece(moment.first.rank, moment.inputs[place])
            for moment in moments
            if place < len(moment.inputs)
        ]
        # The nodes of one sum, of which ranks have different numbers, are one tensor.
        nodes += [piece for piece in given if piece.part.node is not None]
        others = [piece for piece in given if piece.part.node is None]
        if others:
            yield figure_of(others, is_result=False)
    made = [Piece(moment.first.rank, part) for moment in moments for part in moment.outputs]
    if nodes:
        name = base_name(made[0].part) if made else ""
        nodes.sort(key=lambda piece: piece.rank)
        yield figure_of(nodes, is_result=False, name=name)
    if made:
        yield figure_of(made, is_result=True)


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
            for moment in scene.moments
            if moment is not None
            for step in moment.steps
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
                "to": arrow.receiver,
                "stage": arrow.stage,
                "bytes": arrow.num_bytes,
                "carried": [
                    {
                        "name": each.name,
                        "piece": each.piece,
                        "shape": list(each.shape),
                        "bytes": each.num_bytes,
                    }
                    for each in arrow.cargo
                ],
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
