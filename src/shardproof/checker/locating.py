"""The first fault of a program: the earliest wrong tensor, and the module that made it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from shardproof.checker.judging import Judge, Judgement, ParameterJudgement
from shardproof.checker.placement import PARTIAL, SHARD, apart
from shardproof.checker.step_recording import OUTPUT, Recording, TensorPlace

FORWARD, LOSS, BACKWARD, GRADIENT = "forward", "loss", "backward", "gradient"
UPDATE, AFTER = "update", "forward after the update"


@dataclass(frozen=True)
class Fault:
    """The first thing that is wrong.

    Attributes:
        phase: of the step.
        step: number of the step.
        module: path of the module.
        judgement: of the tensor that shows it.
        source: an earlier tensor that is a part, or in another order, and is used as if it were
            not; None if the tensor of `judgement` is the first.
        place: of the tensor in the run; None for a loss and parameters.
    """

    phase: str
    step: int
    module: str
    judgement: Judgement | ParameterJudgement
    source: Judgement | None = None
    place: TensorPlace | None = None

    @property
    def of_module(self) -> Judgement:
        """The judgement, of a phase that judges outputs, gradients of outputs or a loss."""
        assert isinstance(self.judgement, Judgement)  # noqa: S101 - the phase says so
        return self.judgement

    @property
    def of_parameter(self) -> ParameterJudgement:
        """The judgement, of a phase that judges parameters."""
        assert isinstance(self.judgement, ParameterJudgement)  # noqa: S101 - the phase says so
        return self.judgement


@dataclass
class Findings:
    """Everything that was judged.

    Attributes:
        judgements: by step, in order.
        parameters: gradients, weights and optimizer state, in order.
        fault: the first; None if there is none.
    """

    judgements: list[tuple[int, Judgement]] = field(default_factory=list)
    parameters: list[tuple[int, ParameterJudgement]] = field(default_factory=list)
    fault: Fault | None = None


def find(judge: Judge, steps: int) -> Findings:
    """Judge a whole run, up to the end of the phase in which something is wrong."""
    found = Findings()
    for step in range(steps + 1):
        phases: list[Callable[[Judge, int, Findings], Fault | None]] = [_forward, _loss]
        if step < steps:
            phases += [_backward, _update]
        for phase in phases:
            found.fault = phase(judge, step, found)
            if found.fault is not None:
                if step == steps:
                    found.fault = _after(found.fault)
                return found
    return found


def _after(fault: Fault) -> Fault:
    return Fault(AFTER, fault.step, fault.module, fault.judgement, fault.source, fault.place)


class _Open:
    """Tensors that are not yet what a plain program has: parts of a sum, or in another order.

    They are right where they are made, and a mistake if they are used as they are.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[TensorPlace, Judgement]] = []
        self._others: list[tuple[TensorPlace, Judgement]] = []

    def note(self, at: TensorPlace, judgement: Judgement) -> None:
        """Take a tensor that is right."""
        kind = judgement.placement.kind
        if kind == PARTIAL:
            self._parts.append((at, judgement))
        elif kind == SHARD and not judgement.placement.is_in_order:
            self._others.append((at, judgement))
        else:
            self._parts.clear()  # what followed is right, so the sum was made
            if at.side == OUTPUT:
                self._others = [
                    each for each in self._others if not _is_below(each[0].path, at.path)
                ]

    def source(self) -> tuple[TensorPlace, Judgement] | None:
        """What a wrong tensor that comes now was made of; the first of those that are the same."""
        if self._parts:
            last = self._parts[-1][1]
            for at, judgement in self._parts:
                if apart(judgement.whole.flatten(), last.whole.flatten()) <= _tiny(last.whole):
                    return at, judgement
        return self._others[0] if self._others else None


def _forward(judge: Judge, step: int, found: Findings) -> Fault | None:
    fault = None
    opened = _Open()
    judged = [(at, judge.value(at)) for at in judge.places(step)]
    right = _right_around(judged)
    for at, judgement in judged:
        # A program may divide its work among modules otherwise, such as a bias that is added later.
        is_inside = not judgement.is_right and any(_is_below(at.path, path) for path in right)
        found.judgements.append((step, replace(judgement, is_inside=is_inside)))
        if fault is not None or is_inside:
            continue
        if judgement.is_right:
            opened.note(at, judgement)
        else:
            fault = _of_place(judge, FORWARD, step, at, judgement, opened)
    return fault


def _right_around(judged: Sequence[tuple[TensorPlace, Judgement]]) -> set[str]:
    """The modules whose outputs are right in all their calls."""
    outputs = [(at.path, each.is_right) for at, each in judged if at.side == OUTPUT]
    wrong = {path for path, is_right in outputs if not is_right}
    return {path for path, _ in outputs} - wrong


def _is_below(path: str, around: str) -> bool:
    """Whether a module is inside another."""
    return path != around and (not around or path.startswith(f"{around}."))


def _of_place(
    judge: Judge, phase: str, step: int, at: TensorPlace, judgement: Judgement, opened: _Open
) -> Fault:
    source = opened.source()
    if source is not None:
        place, earlier = source
        return Fault(phase, step, _maker(judge, place), judgement, earlier, at)
    return Fault(phase, step, _maker(judge, at), judgement, None, at)


def _maker(judge: Judge, at: TensorPlace) -> str:
    """The module whose forward makes a tensor: that of an output, the caller of an input's."""
    return at.path if at.side == OUTPUT else caller(judge, at.path)


def caller(judge: Judge, path: str) -> str:
    """The nearest module around another that has a forward of its own."""
    called = {at.path for at in judge.runs.ranks[0].values}
    while path:
        path = path.rpartition(".")[0]
        if path in called or not path:
            break
    return path


def _loss(judge: Judge, step: int, found: Findings) -> Fault | None:
    judgement = judge.loss(step)
    found.judgements.append((step, judgement))
    if judgement.is_right:
        return None
    mean = sum(judgement.locals[1:], start=judgement.locals[0]) / judge.degree
    is_shared = max(apart(each, mean) for each in judgement.locals) > _tiny(mean)
    if is_shared and apart(mean, judgement.whole) <= judge.bound(judgement.whole, "value"):
        return None  # each rank has the loss of its own samples; the gradients say if that is right
    opened = _Open()
    for at in judge.places(step):
        opened.note(at, judge.value(at))
    source = opened.source()
    if source is not None:
        at, earlier = source
        return Fault(LOSS, step, _maker(judge, at), judgement, earlier)
    return Fault(LOSS, step, "", judgement)


def _backward(judge: Judge, step: int, found: Findings) -> Fault | None:
    gradients = {each.layout.name: each for each in _gradients(judge, step)}
    found.parameters += [(step, each) for each in gradients.values()]
    if gradients and all(each.is_right for each in gradients.values()):
        # What modules pass on may be scaled or in parts as long as the parameters' gradients are
        # right; it is judged for the report only.
        found.judgements += [
            (step, each)
            for each in map(judge.gradient, judge.gradient_places(step))
            if each.is_right
        ]
        return None
    fault: Fault | None = None
    opened = _Open()
    for at in judge.gradient_places(step):
        judgement = judge.gradient(at)
        found.judgements.append((step, judgement))
        if fault is not None:
            continue
        if not judgement.is_right:
            fault = _of_place(judge, BACKWARD, step, at, judgement, opened)
            continue
        own = [each for each in gradients.values() if each.module == at.path]
        wrong = [each for each in own if not each.is_right]
        if at.side == OUTPUT and wrong:
            opened.note(at, judgement)
            fault = _of_gradient(judge, step, wrong[0], opened)
        else:
            opened.note(at, judgement)
    if fault is None:
        wrong = [each for each in gradients.values() if not each.is_right]
        fault = _of_gradient(judge, step, wrong[-1], _Open())
    return fault


def _of_gradient(judge: Judge, step: int, wrong: ParameterJudgement, opened: _Open) -> Fault:
    source = opened.source()
    if source is not None and source[1].placement.kind == PARTIAL:
        return Fault(BACKWARD, step, source[0].path, wrong, source[1])
    return Fault(GRADIENT, step, wrong.module, wrong)


def _gradients(judge: Judge, step: int) -> Iterator[ParameterJudgement]:
    """The gradients that the update uses; those after backward where it uses none."""
    has_used = any(key[0] == step for key in judge.runs.ranks[0].used_gradients)

    def raw(each: Recording, name: str) -> Tensor | None:
        return each.parameter_gradients.get((step, name))

    def used(each: Recording, name: str) -> Tensor | None:
        return each.used_gradients.get((step, name))

    for layout in judge.layouts.values():
        after_backward = judge.parameter(layout, raw, "gradient of ")
        judgement = after_backward
        if has_used:
            judgement = judge.parameter(layout, used, "gradient of ")
            # Clipping is a part of the update, and is judged there.
            if after_backward is not None and after_backward.is_right:
                judgement = after_backward
        if judgement is not None:
            yield judgement


def _update(judge: Judge, step: int, found: Findings) -> Fault | None:
    first: Fault | None = None

    def used(each: Recording, name: str) -> Tensor | None:
        return each.used_gradients.get((step, name))

    def weight(each: Recording, name: str) -> Tensor | None:
        return each.weights.get((step, name))

    for get, what in ((used, "gradient at the update of "), (weight, "updated ")):
        for layout in judge.layouts.values():
            judgement = judge.parameter(layout, get, what)
            if judgement is None:
                continue
            found.parameters.append((step, judgement))
            if not judgement.is_right and first is None:
                first = Fault(UPDATE, step, judgement.module, judgement)
    return first or _state(judge, step, found)


def _state(judge: Judge, step: int, found: Findings) -> Fault | None:
    first: Fault | None = None
    entries = {key[2] for key in judge.runs.ranks[0].state if key[0] == step}
    for entry in sorted(entries):

        def get(each: Recording, name: str, entry: str = entry) -> Tensor | None:
            return each.state.get((step, name, entry))

        for layout in judge.layouts.values():
            if any(get(each, layout.name) is None for each in judge.runs.ranks):
                continue
            judgement = judge.parameter(layout, get, f"{entry} of ")
            if judgement is None or judgement.whole.shape != layout.shape:
                continue
            found.parameters.append((step, judgement))
            if not judgement.is_right and first is None:
                first = Fault(UPDATE, step, judgement.module, judgement)
    return first


def _tiny(x: Tensor) -> float:
    return 2.0**-30 * float(x.abs().max()) if x.numel() else 0.0
