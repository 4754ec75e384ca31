"""What one rank does, written down step by step.

Products, additions and collectives are told by the package. Torch's own operations are seen by the
observer; those that only make views are left out, and so are those inside our own functions. A
module of ours that tells nothing (a norm, dropout) is one step forward and one backward.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.cut.tensor import RULES, CutTensor
from shardproof.layers.base import ShardedModule
from shardproof.layers.registry import record_of
from shardproof.observing import (
    REPLICATE,
    Memory,
    Observer,
    Operand,
    Placement,
    StepEvent,
    placement_of,
    shard,
    storage_of,
    tensors_in,
)
from shardproof.trace.hooks import first_tensor
from shardproof.trace.placements import TensorPlacements
from shardproof.trace.step import Part, TraceStep

# What these of the package call is the work of a user: a case, a model, a loss.
OF_USERS = (
    "cli",
    "engines",
    "mistakes",
    "prover.cases",
    "prover.training",
    "ranks",
    "showing",
)
# They stand around functions of torch that a user calls.
_GUARDS = (
    "shardproof.cut.",
    "shardproof.numerics.broadcasting",
    "shardproof.numerics.forms",
    "shardproof.plans.layer_forwards",
    *(
        f"shardproof.layers.{name}"
        for name in (
            "data_parallel_guard",
            "grad_scaler",
            "guard",
            "init_guard",
            "refused_functions",
            "state_guard",
            "step_guard",
        )
    ),
)
# They compute nothing.
_QUIET = {
    "_local_scalar_dense",
    "_to_copy",
    "alias",
    "clone",
    "copy_",
    "detach",
    "empty_like",
    "equal",
    "fill_",
    "full_like",
    "is_same_size",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",  # autograd copies a gradient that somebody else still holds
    "new_full",
    "new_ones",
    "new_zeros",
    "ones_like",
    "zero_",
    "zeros_like",
}
_USER_NAMES = tuple(f"shardproof.{name}" for name in OF_USERS)
_DRAWN = torch.Tag.nondeterministic_seeded
_DEPTH = 32  # nodes of the graph that one module is taken to have made


class RankTrace(Observer):
    """The observer of one rank.

    Args:
        rank: whose.
        num_values: values of larger tensors are not kept; 0: none are.
        limit: steps that are kept.

    Attributes:
        steps: so far.
        num_dropped: steps beyond the limit.
        is_writing: False while the rank is only watched: what it holds and how it lies is learned,
            and no step is written.
    """

    def __init__(self, rank: int, *, num_values: int, limit: int) -> None:
        super().__init__()
        self.steps: list[TraceStep] = []
        self.num_dropped = 0
        self.is_writing = True
        self.keeps_values = num_values > 0
        self._rank, self._num_values, self._limit = rank, num_values, limit
        self._memory, self._placements = Memory(), TensorPlacements()
        self._names: dict[int, str] = {}
        self._references: list[Any] = []  # whose ids are names
        self._stack: list[tuple[nn.Module, int]] = []
        self._nodes: dict[int, str] = {}
        self._started: dict[int, int | None] = {}
        self._is_updating = False
        self._before: dict[int, tuple[Part, Placement | None]] = {}
        self._num_meetings: dict[str, int] = {}
        self._num_seen = 0
        self._is_in_rule = False

    def __exit__(self, *error: Any) -> None:
        """End the trace; hooks that are still in a graph write nothing from now on."""
        self.is_writing = False
        super().__exit__(*error)

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operation; record it unless it is a view or part of our own functions."""
        operands = tensors_in((args, kwargs))
        before = {storage_of(x) for x in operands}
        caller = _caller()
        is_step = caller == "user" and self._is_step(func, operands)
        inputs = self._inputs(func, args) if is_step else ()
        placements = self._placements.look(operands)
        result = func(*args, **kwargs)
        results = tensors_in(result)
        self._memory.see([*operands, *results])
        self._placements.carry(
            func, placements, (args, kwargs), results, is_ours=caller == "package"
        )
        is_view = not func._schema.is_mutable and all(storage_of(y) in before for y in results)
        if is_step and results and not is_view:
            name = str(func.overloadpacket).removeprefix("aten.")
            self._write(self._phase(func, args), self._module(), name, inputs, results[0])
        return result

    def rule(self, name: str, args: Any, compute: Callable[[], Any]) -> Any:
        """Record an operation on cut tensors for which no other step was recorded."""
        if self._is_in_rule:
            return compute()
        self._is_in_rule, num_seen = True, self._num_seen
        try:
            result = compute()
        finally:
            self._is_in_rule = False
        y, x = first_tensor(result), first_tensor(args)
        if isinstance(result, CutTensor) and self._placements.of(result.local) is None:
            self._placements.learn(result.local, _placement(result))
        # The forward of a module of ours is written when the module ends; a move computes nothing.
        is_quiet = name == "forward" or RULES.get(name) is RULES["view"]
        is_silent = self._num_seen == num_seen and not is_quiet
        if is_silent and y is not None and x is not None and storage_of(y) != storage_of(x):
            self._write_silent(self._module(), name, x, y)
        return result

    def on_event(self, event: StepEvent) -> None:
        """Record what the package did, or a collective that it has started."""
        for operand in (*event.inputs, *([event.output] if event.output else ())):
            if operand.placement is not None:
                self._placements.learn(operand.tensor, operand.placement)
        meeting = None
        if event.is_collective:
            num_meetings = self._num_meetings.get(event.axis, 0) + 1
            self._num_meetings[event.axis], meeting = num_meetings, num_meetings - 1
        output = None if event.addition or event.output is None else event.output
        step = self._step(event.phase, event.who, event.operation, event.detail)
        number = self._add(
            replace(
                step,
                inputs=tuple(self._part(each) for each in event.inputs),
                output=None if output is None else self._part(output),
                message_bytes=event.message_bytes,
                sent_bytes=event.sent_bytes,
                axis=event.axis,
                meeting=meeting,
                sends=tuple(event.sends),
            )
        )
        if event.addition:
            self._started[id(event)] = number

    def on_finish(self, event: StepEvent) -> None:
        """Write down the result of a collective, and the additions in it."""
        if id(event) not in self._started:  # it was started before the trace
            return
        number = self._started.pop(id(event))
        if event.output is None:
            return
        output = self._part(event.output)
        if number is not None:
            self.steps[number] = replace(self.steps[number], output=output)
        step = self._step(event.phase, event.who, "addition", event.addition)
        self._add(replace(step, output=output))

    def _step(self, phase: str, module: str, operation: str, detail: str = "") -> TraceStep:
        """A step with the fields that every step has."""
        number, held_bytes = len(self.steps), self._memory.num_bytes
        return TraceStep(
            self._rank, number, phase, module, operation, detail, (), None, held_bytes=held_bytes
        )

    def placement(self, x: Tensor) -> Placement | None:
        """The placement of a tensor, as far as the trace knows it."""
        return self._placements.of(x)

    def enter_module(self, module: nn.Module) -> None:
        """Learn the names of a model when its outermost module begins."""
        self._is_updating = False  # a closure, or a step that has raised
        if not self._stack and id(module) not in self._names:
            self._learn(module)
        self._stack.append((module, self._num_seen))

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record a module of ours that reported no step; remember its nodes of the graph."""
        if not self._stack or self._stack[-1][0] is not module:  # entered before the trace
            return
        name = self._module()
        _, num_seen = self._stack.pop()
        y, x = first_tensor(output), first_tensor(args)
        if y is None or x is None or any(True for _ in module.children()):
            return
        # Layers that share an input compute together: what the later ones return was told before.
        is_known = isinstance(module, ShardedModule) and self._placements.of(y) is not None
        is_silent = self._num_seen == num_seen and storage_of(y) != storage_of(x) and not is_known
        if is_silent:
            self._write_silent(name, type(module).__name__, x, y)
        elif y.grad_fn is not None:
            self._claim(y.grad_fn, x.grad_fn, name)

    def _write_silent(self, module: str, operation: str, x: Tensor, y: Tensor) -> None:
        """Record a module that reported no step: forward now, and backward when it runs."""
        self._placements.learn(
            y, self._placements.of(y) or _placement_if_alike(self._placements.of(x), x, y)
        )
        inputs = (self._part(Operand("x", x, self._placements.of(x))),)
        self._write("forward", module, operation, inputs, y)
        if hasattr(y.grad_fn, "_forward_cls"):  # ours, which torch's operations do not show
            self._watch_backward(y.grad_fn, module, operation, self._placements.of(y))
        elif y.grad_fn is not None:
            self._claim(y.grad_fn, x.grad_fn, module)

    def enter_step(self, optimizer: Optimizer) -> None:
        """Note the parameters before they are updated."""
        self._is_updating = True
        places = ((p, self._placements.of(p)) for p, _ in _updated(optimizer))
        self._before = {
            id(p): (self._part(Operand(self._name(p), p, place)), place) for p, place in places
        }

    def leave_step(self, optimizer: Optimizer) -> None:
        """Record the update of each parameter."""
        before, self._before = self._before, {}
        self._is_updating = False
        for p, group in _updated(optimizer):
            if id(p) not in before or p.grad is None:
                continue
            name, place = self._name(p), before[id(p)][1]  # a closure may have taught the name
            self._placements.learn(p, place)
            output = self._part(Operand(name, p, place))
            weight = replace(before[id(p)][0], name=name)
            inputs = (weight, self._part(Operand("grad", p.grad, place)))
            step = self._step("update", name, "update", type(optimizer).__name__)
            rule = _rule(optimizer, group)
            self._add(replace(step, inputs=inputs, output=output, rule=rule))

    def _inputs(self, func: Any, args: tuple[Any, ...]) -> tuple[Part, ...]:
        names = [argument.name for argument in func._schema.arguments]
        return tuple(
            self._part(Operand(name, x, self._placements.of(x)))
            for name, arg in zip(names, args, strict=False)
            for x in tensors_in(arg)
        )

    def _is_step(self, func: Any, operands: Sequence[Tensor]) -> bool:
        name = str(func.overloadpacket).removeprefix("aten.")
        of_optimizer = self._is_updating and not torch.is_grad_enabled()
        return bool(operands) and name not in _QUIET and not of_optimizer

    def _phase(self, func: Any, args: tuple[Any, ...]) -> str:
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        if not func._schema.is_mutable or torch.is_grad_enabled():
            return "forward"
        if _DRAWN in func.tags:
            return "setup"
        first = args[0] if args else None
        if not isinstance(first, nn.Parameter):
            return "forward"
        return "setup" if first.grad is None else "update"

    def _module(self) -> str:
        """The name of the module that computes; in backward, of the module that made the node."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return self._names.get(id(self._stack[-1][0]), "") if self._stack else ""
        if hasattr(node, "variable"):  # it adds to the gradient of a parameter
            return self._names.get(id(node.variable), "")
        return self._nodes.get(node._sequence_nr(), "")

    def _part(self, operand: Operand) -> Part:
        return Part.of(operand, num_values=self._num_values if self.is_writing else 0)

    def _write(
        self,
        phase: str,
        module: str,
        operation: str,
        inputs: tuple[Part, ...],
        y: Tensor,
        called: str = "y",
    ) -> None:
        output = self._part(Operand(called, y, self._placements.of(y)))
        self._add(replace(self._step(phase, module, operation), inputs=inputs, output=output))

    def _add(self, step: TraceStep) -> int | None:
        self._num_seen += 1
        if not self.is_writing:
            return None
        if len(self.steps) >= self._limit:
            self.num_dropped += 1
            return None
        self.steps.append(step)
        return step.number

    def _learn(self, root: nn.Module) -> None:
        """The names of a model's modules and parameters, and how its parameters lie."""
        self._references.append(root)
        own = record_of(root).name if isinstance(root, ShardedModule) else ""
        for name, module in root.named_modules(prefix=own):
            self._names[id(module)] = name or type(module).__name__
            layouts = record_of(module).layouts if isinstance(module, ShardedModule) else {}
            prefix = f"{name}." if name else ""
            for short, parameter in module.named_parameters(recurse=False):
                self._names[id(parameter)] = prefix + short
                layout = layouts.get(short)
                self._placements.learn(
                    parameter, REPLICATE if layout is None else placement_of(layout)
                )

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), "parameter")

    def _claim(self, end: Any, start: Any, name: str) -> None:
        """Remember the nodes between a module's output and its input as those of the module."""
        waiting = [end]
        for _ in range(_DEPTH):
            if not waiting:
                return
            node = waiting.pop()
            if node is None or node is start or hasattr(node, "variable"):
                continue
            if node._sequence_nr() in self._nodes:
                continue
            self._nodes[node._sequence_nr()] = name
            waiting.extend(each for each, _ in node.next_functions)

    def _watch_backward(self, node: Any, name: str, kind: str, place: Placement | None) -> None:
        """Record the backward of a module of ours that reports no step."""

        def on_backward(grads_x: Sequence[Tensor | None], grads_y: Sequence[Tensor | None]) -> None:
            grad_x, grad_y = first_tensor(list(grads_x)), first_tensor(list(grads_y))
            if grad_x is None or grad_y is None:
                return
            self._placements.learn(grad_x, _placement_if_alike(place, grad_y, grad_x))
            inputs = (self._part(Operand("grad_y", grad_y, place)),)
            self._write("backward", name, kind, inputs, grad_x, "grad_x")

        node.register_hook(on_backward)


def _caller() -> str:
    """Who called an operation of torch: "package", "optimizer" (torch's) or "user".

    It is the nearest frame that is neither torch's nor an observer's nor a guard's.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        is_observer = frame.f_code.co_name in ("operation", "__torch_dispatch__")
        if name.startswith("torch.optim."):
            return "optimizer"
        if not is_observer and not name.startswith(("torch.", *_GUARDS)):
            is_ours = name.startswith("shardproof.") and not name.startswith(_USER_NAMES)
            return "package" if is_ours else "user"
        frame = frame.f_back  # type: ignore[assignment]  # the outermost frame has none
    return "user"


def _placement_if_alike(place: Placement | None, x: Tensor, y: Tensor) -> Placement | None:
    """The given placement, if `x` and `y` have the same shape."""
    return place if x.shape == y.shape else None


def _placement(x: CutTensor) -> Placement:
    """How the part of a cut tensor lies."""
    held = x.spec.cut.held(x.spec.region.rank).tolist()
    run = range(held[0], held[-1] + 1) if held else range(0)
    return shard(x.spec.dim, run if len(run) == len(held) else None, x.spec.shape[x.spec.dim])


def _updated(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each parameter of an optimizer, with its group."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p, group


def _rule(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """The formula of an update by plain SGD, with the learning rate; "" for any other."""
    others = ("momentum", "weight_decay", "maximize", "dampening")
    if type(optimizer) is not torch.optim.SGD or any(group.get(name) for name in others):
        return ""
    return f"w = w - {float(group['lr']):g} * grad"
