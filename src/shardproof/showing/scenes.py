"""The scenes of a training step: what the terminal, the page and the JSON all show.

A scene is a row of the traces side by side: what the ranks do between two meetings stands in their
order, and a collective is one scene of all ranks. Steps of the prover's own are no scenes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardproof.comm.reporting import FREE_ORDER
from shardproof.showing.actions import RankAction, actions_of, base_name
from shardproof.showing.arrows import Arrow, arrows_of
from shardproof.showing.sentences import CUT_AGAIN, placement_change, placement_sentence, sentences
from shardproof.showing.tensors import RankPart, SceneTensor, tensor_of
from shardproof.trace.step import Part, TraceStep
from shardproof.trace.text import aligned
from shardproof.trace.trace import Trace
from shardproof.tree import node_name

MOST_SCENES = 300
PHASES = ("setup", "forward", "backward", "update")

Row = tuple[RankAction | None, ...]

# `grad` is the one number that comes from the step before.
_LOSS_BACKWARD = {"mse_loss": "grad_y = 2 * (y - target) * grad"}


@dataclass(frozen=True)
class Scene:
    """What all ranks do at one point of the step.

    Attributes:
        number: counted from 1.
        phase: "forward", "backward" or "update".
        title: who does what.
        formula: what is computed, if the trace has it.
        sentences: sentences for a reader who sees no picture.
        is_collective: the ranks meet.
        actions: of every rank, None for one that does nothing here.
        tensors: the tensors that are read, then those that are made.
        arrows: what is sent to whom; none if the transport decides that.
        held: bytes that every rank holds after it.
    """

    number: int
    phase: str
    title: str
    formula: str
    sentences: tuple[str, ...]
    is_collective: bool
    actions: tuple[RankAction | None, ...]
    tensors: tuple[SceneTensor, ...]
    arrows: tuple[Arrow, ...]
    held: tuple[int, ...]


@dataclass(frozen=True)
class StepView:
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
        sentences = []
        if self.num_left_out:
            counts = ", ".join(f"{count} {phase}" for phase, count in self.num_left_out.items())
            first = len(self.scenes) + 1
            sentences.append(f"From step {first} on, steps are left out: {counts}.")
        if any(self.num_dropped):
            counts = ", ".join(
                f"{dropped} of rank {rank}" for rank, dropped in enumerate(self.num_dropped)
            )
            sentences.append(f"The trace was full, and further steps were not kept: {counts}.")
        return tuple(sentences)

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


def view_of(
    trace: Trace, *, title: str, about: Sequence[str] = (), most_scenes: int = MOST_SCENES
) -> StepView:
    """Make the scenes of a trace.

    Args:
        trace: of all ranks.
        title: what was traced.
        about: sentences on it.
        most_scenes: what is beyond is counted, and left out.
    """
    rows = _rows(trace)
    held_bytes = [0] * len(trace.ranks)
    scenes: list[Scene] = []
    earlier = _EarlierScenes()
    for number, row in enumerate(rows[:most_scenes], 1):
        held_bytes = [
            before if action is None else action.held_bytes
            for before, action in zip(held_bytes, row, strict=True)
        ]
        scenes.append(_scene(number, row, held=held_bytes, earlier=earlier))
    left_out: dict[str, int] = {}
    for row in rows[most_scenes:]:
        phase = _first(row).first.phase
        left_out[phase] = left_out.get(phase, 0) + 1
    return StepView(
        title,
        tuple(about),
        degree=len(trace.ranks),
        scenes=tuple(scenes),
        num_left_out=left_out,
        num_dropped=trace.num_dropped,
        has_values=trace.values,
    )


def _rows(trace: Trace) -> list[Row]:
    """What the ranks do side by side; each row becomes a scene."""
    ranks = [actions_of([step for step in steps if step.phase in PHASES]) for steps in trace.ranks]
    action_of = {(m.first.rank, m.first.number): m for actions in ranks for m in actions}
    rows = aligned([[action.first for action in actions] for actions in ranks])
    return [
        tuple(None if step is None else action_of[step.rank, step.number] for step in part)
        for row in rows
        for part in _alike(row)
    ]


def _alike(row: Sequence[TraceStep | None]) -> Iterator[tuple[TraceStep | None, ...]]:
    """Split a row so that all steps of a row do the same."""
    kinds = dict.fromkeys(
        (step.phase, step.module, step.operation) for step in row if step is not None
    )
    for kind in kinds:
        yield tuple(
            step if step and (step.phase, step.module, step.operation) == kind else None
            for step in row
        )


class _EarlierScenes:
    """Parts of earlier scenes that later scenes refer to.

    Attributes:
        gathered: modules whose output was gathered in forward.
        target: of the last loss.
    """

    def __init__(self) -> None:
        self.gathered: set[str] = set()
        self.target: SceneTensor | None = None

    def learn(self, first: RankAction, tensors: Sequence[SceneTensor]) -> None:
        """Remember the parts of a forward scene that later scenes refer to."""
        step = first.first
        if step.phase != "forward":
            return
        is_output = any(tensor.is_result and tensor.name == "y" for tensor in tensors)
        if step.operation == "all_gather" and is_output:
            self.gathered.add(step.module)
        if step.operation == "loss":
            self.target = next((f for f in tensors if f.name == "target"), None)

    def cut_again(self, step: TraceStep) -> str:
        """The sentence for ranks that take their columns of a gathered gradient; or ""."""
        if step.phase != "backward" or step.module not in self.gathered or not step.inputs:
            return ""
        operand = step.inputs[0]
        if step.operation != "product" or not operand.placement.startswith("Shard"):
            return ""
        self.gathered.remove(step.module)
        return CUT_AGAIN.format(name=operand.name)


def _scene(number: int, row: Row, *, held: Sequence[int], earlier: _EarlierScenes) -> Scene:
    action = _first(row)
    first = action.first
    tensors = tuple(_tensors(row))
    earlier.learn(action, tensors)
    if first.operation == "loss" and first.phase == "backward" and earlier.target is not None:
        tensors = (tensors[0], earlier.target, *tensors[1:])
    return Scene(
        number=number,
        phase=first.phase,
        title=f"{first.module}: {first.operation}" if first.module else first.operation,
        formula=_formula(row),
        sentences=sentences(row, tensors, first=earlier.cut_again(first)),
        is_collective=first.is_collective,
        actions=row,
        tensors=tensors,
        arrows=arrows_of(row),
        held=tuple(held),
    )


def _formula(row: Row) -> str:
    """The formula; for products of partial sums also their leaves."""
    return "; ".join(dict.fromkeys(filter(None, (_formula_of(m, row) for m in row if m))))


def _formula_of(action: RankAction, row: Row) -> str:
    step, name = action.first, _result_name(action)
    if step.is_collective:
        added = action.addition
        of = "the sum of " if added == FREE_ORDER else ""
        return f"{name} = {of}{added}" if added and name else ""
    if step.operation == "loss" and step.phase == "backward":
        return _LOSS_BACKWARD.get(step.module, step.detail)
    if step.rule:
        return f"{step.rule} ({step.detail})"
    if action.addition:
        return f"{step.detail}, added as {action.addition}"
    node = step.output.node if step.output is not None else None
    if node is None:
        return step.detail
    nodes = sorted({p.node for other in row if other for p in other.outputs if p.node is not None})
    plain = step.detail.removesuffix(f", {node_name(node)}")
    return f"{plain} for each of: {', '.join(map(node_name, nodes))}"


def _result_name(action: RankAction) -> str:
    return action.outputs[0].name if action.outputs else ""


def _first(row: Row) -> RankAction:
    return next(action for action in row if action is not None)


def _tensors(row: Row) -> Iterator[SceneTensor]:
    """The tensors that the ranks read, in the order of their inputs, then the results."""
    actions = [action for action in row if action is not None]
    most = max(len(action.inputs) for action in actions)
    nodes: list[RankPart] = []
    for place in range(most):
        parts = [
            RankPart(action.first.rank, action.inputs[place])
            for action in actions
            if place < len(action.inputs)
        ]
        # The nodes of one sum, of which ranks have different numbers, are one tensor.
        nodes += [piece for piece in parts if piece.part.node is not None]
        others = [piece for piece in parts if piece.part.node is None]
        if others:
            yield tensor_of(others, is_result=False)
    results = [RankPart(action.first.rank, part) for action in actions for part in action.outputs]
    if nodes:
        name = base_name(results[0].part) if results else ""
        nodes.sort(key=lambda piece: piece.rank)
        yield tensor_of(nodes, is_result=False, name=name)
    if results:
        yield tensor_of(results, is_result=True)


def _scene_as_dict(scene: Scene) -> dict[str, Any]:
    return {
        "number": scene.number,
        "phase": scene.phase,
        "title": scene.title,
        "formula": scene.formula,
        "told": list(scene.sentences),
        "is_collective": scene.is_collective,
        "steps": [
            {"rank": step.rank, "number": step.number, "message_bytes": step.message_bytes}
            for action in scene.actions
            if action is not None
            for step in action.steps
        ],
        "figures": [
            {
                "name": tensor.name,
                "placement": tensor.placement,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "is_result": tensor.is_result,
                "lies": placement_sentence(tensor),
                "pieces": [_piece_as_dict(piece.rank, piece.part) for piece in tensor.pieces],
            }
            for tensor in scene.tensors
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
                    for each in arrow.sent_pieces
                ],
            }
            for arrow in scene.arrows
        ],
        "change": placement_change(scene.tensors),
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
