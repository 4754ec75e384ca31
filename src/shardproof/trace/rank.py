"""What one rank does, written down step by step.

Products, additions and collectives are told by the package. Torch's own operations are seen by the
observer; those that only make views are left out, and so are those inside our own functions. A
module of ours that tells nothing (a norm, dropout) is one step forward and one backward.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.layers.base import ShardedModule
from shardproof.leaves import Layout
from shardproof.observing import (
    REPLICATE,
    Memory,
    Observer,
    Operand,
    Placement,
    Told,
    address,
    shard,
    tensors_in,
)
from shardproof.trace.hooks import first_tensor
from shardproof.trace.places import Places
from shardproof.trace.step import Part, Step

# What these of the package call is the work of a user: a case, a model, a loss.
_OF_USERS = tuple(
    f"shardproof.{name}"
    for name in ("bench", "cases", "cli", "engines", "prover", "ranks", "showing")
)
# They stand around functions of torch that a user calls.
_GUARDS = tuple(
    f"shardproof.layers.{name}"
    for name in (
        "data_parallel",
        "filling",
        "guard",
        "refuse",
        "scaling",
        "state_guard",
        "step_guard",
    )
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
    "is_same_size",
    "lift_fresh",
    "new_empty",
    "new_zeros",
    "ones_like",
    "zero_",
    "zeros_like",
}
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
        self.steps: list[Step] = []
        self.num_dropped = 0
        self.is_writing = True
        self._rank, self._num_values, self._limit = rank, num_values, limit
        self._memory, self._places = Memory(), Places()
        self._names: dict[int, str] = {}
        self._kept: list[Any] = []  # whose ids are names
        self._stack: list[tuple[nn.Module, int]] = []
        self._nodes: dict[int, str] = {}
        self._started: dict[int, int | None] = {}
        self._updating: dict[int, tuple[Part, Placement | None]] | None = None
        self._num_meetings = 0
        self._num_seen = 0

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it; write it down if it is no view and not a part of something of ours."""
        given = list(tensors_in((args, kwargs)))
        before = {address(x) for x in given}
        is_ours = _is_ours()
        is_step = not is_ours and self._updating is None and self._is_step(func, given)
        inputs = self._inputs(func, args) if is_step else ()
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        self._memory.see([*given, *made])
        self._places.carry(func, given, made, is_ours=is_ours)
        is_view = not func._schema.is_mutable and all(address(y) in before for y in made)
        if is_step and made and not is_view:
            name = str(func.overloadpacket).removeprefix("aten.")
            self._write(self._phase(args), self._module(), name, "", inputs, made[0])
        return result

    def told(self, told: Told) -> None:
        """Write down what the package did, or a collective that it has started."""
        for operand in (*told.inputs, *([told.output] if told.output else ())):
            if operand.placement is not None:
                self._places.learn(operand.tensor, operand.placement)
        meeting = None
        if told.is_collective:
            self._num_meetings += not told.is_rest
            meeting = self._num_meetings - 1
        output = None if told.addition or told.output is None else told.output
        number = self._add(
            Step(
                self._rank,
                len(self.steps),
                told.phase,
                told.who,
                told.operation,
                told.detail,
                tuple(self._part(each) for each in told.inputs),
                None if output is None else self._part(output),
                told.message_bytes,
                told.sent_bytes,
                self._memory.held,
                meeting,
                told.is_rest,
            )
        )
        if told.addition:
            self._started[id(told)] = number

    def finished(self, told: Told) -> None:
        """Write down the result of a collective, and the additions in it."""
        number = self._started.pop(id(told))
        if told.output is None:
            return
        output = self._part(told.output)
        if number is not None:
            self.steps[number] = replace(self.steps[number], output=output)
        self._add(
            Step(
                self._rank,
                len(self.steps),
                told.phase,
                told.who,
                "addition",
                told.addition,
                (),
                output,
                held_bytes=self._memory.held,
            )
        )

    def enter_module(self, module: nn.Module) -> None:
        """Learn the names of a model when its outermost module begins."""
        if not self._stack and id(module) not in self._names:
            self._learn(module)
        self._stack.append((module, self._num_seen))

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """Write a module of ours down that has told nothing; remember which nodes are its own."""
        name = self._module()
        _, num_seen = self._stack.pop()
        y, x = first_tensor(output), first_tensor(args)
        if y is None or x is None or any(True for _ in module.children()):
            return
        # Layers that share an input compute together: what the later ones return was told before.
        is_known = isinstance(module, ShardedModule) and self._places.of(y) is not None
        is_silent = self._num_seen == num_seen and address(y) != address(x) and not is_known
        if is_silent:
            self._places.learn(y, _kept(self._places.of(x), x, y))
            inputs = (self._part(Operand("x", x, self._places.of(x))),)
            self._write("forward", name, type(module).__name__, "", inputs, y)
        if y.grad_fn is not None and is_silent:
            self._watch_backward(y.grad_fn, name, type(module).__name__, self._places.of(y))
        elif y.grad_fn is not None:
            self._claim(y.grad_fn, x.grad_fn, name)

    def enter_step(self, optimizer: Optimizer) -> None:
        """Note the parameters before they are updated."""
        places = ((p, self._places.of(p)) for p in _updated(optimizer))
        self._updating = {
            id(p): (self._part(Operand(self._name(p), p, place)), place) for p, place in places
        }

    def leave_step(self, optimizer: Optimizer) -> None:
        """Write down what became of each parameter."""
        before, self._updating = self._updating or {}, None
        for p in _updated(optimizer):
            if id(p) not in before or p.grad is None:
                continue
            given, place = before[id(p)]
            self._places.learn(p, place)
            grad = self._part(Operand("grad", p.grad, place))
            kind = type(optimizer).__name__
            self._write("update", given.name, "update", kind, (given, grad), p, given.name)

    def _inputs(self, func: Any, args: tuple[Any, ...]) -> tuple[Part, ...]:
        names = [argument.name for argument in func._schema.arguments]
        return tuple(
            self._part(Operand(name, x, self._places.of(x)))
            for name, arg in zip(names, args, strict=False)
            for x in tensors_in(arg)
        )

    def _is_step(self, func: Any, given: Sequence[Tensor]) -> bool:
        name = str(func.overloadpacket).removeprefix("aten.")
        return bool(given) and name not in _QUIET

    def _phase(self, args: tuple[Any, ...]) -> str:
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        first = args[0] if args else None
        if torch.is_grad_enabled() or not isinstance(first, nn.Parameter):
            return "forward"
        return "setup" if first.grad is None else "update"

    def _module(self) -> str:
        """The module that computes; in backward, the one that made the node."""
        node = torch._C._current_autograd_node()
        if node is not None:
            return self._nodes.get(node._sequence_nr(), "")
        return self._names.get(id(self._stack[-1][0]), "") if self._stack else ""

    def _part(self, operand: Operand) -> Part:
        return Part.of(operand, num_values=self._num_values if self.is_writing else 0)

    def _write(
        self,
        phase: str,
        module: str,
        operation: str,
        detail: str,
        inputs: tuple[Part, ...],
        y: Tensor,
        called: str = "y",
    ) -> None:
        output = self._part(Operand(called, y, self._places.of(y)))
        self._add(
            Step(
                self._rank,
                len(self.steps),
                phase,
                module,
                operation,
                detail,
                inputs,
                output,
                held_bytes=self._memory.held,
            )
        )

    def _add(self, step: Step) -> int | None:
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
        self._kept.append(root)
        for name, module in root.named_modules():
            self._names[id(module)] = name or type(module).__name__
            layouts = module.layouts if isinstance(module, ShardedModule) else {}
            prefix = f"{name}." if name else ""
            for short, parameter in module.named_parameters(recurse=False):
                self._names[id(parameter)] = prefix + short
                layout = layouts.get(short)
                self._places.learn(parameter, REPLICATE if layout is None else _placed(layout))

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), "parameter")

    def _claim(self, end: Any, start: Any, name: str) -> None:
        """The nodes between a module's output and its input are its own."""
        waiting = [end]
        for _ in range(_DEPTH):
            if not waiting:
                return
            node = waiting.pop()
            if node is None or node is start or node._sequence_nr() in self._nodes:
                continue
            self._nodes[node._sequence_nr()] = name
            waiting.extend(each for each, _ in node.next_functions)

    def _watch_backward(self, node: Any, name: str, kind: str, place: Placement | None) -> None:
        """Write down the backward of a module of ours that tells nothing."""

        def done(grads_x: Sequence[Tensor | None], grads_y: Sequence[Tensor | None]) -> None:
            grad_x, grad_y = first_tensor(list(grads_x)), first_tensor(list(grads_y))
            if grad_x is None or grad_y is None:
                return
            self._places.learn(grad_x, _kept(place, grad_y, grad_x))
            inputs = (self._part(Operand("grad_y", grad_y, place)),)
            self._write("backward", name, kind, "", inputs, grad_x, "grad_x")

        node.register_hook(done)


def _is_ours() -> bool:
    """Whether the nearest frame that is not torch's belongs to the package's own code."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        is_observer = frame.f_code.co_name in ("operation", "__torch_dispatch__")
        if not is_observer and not name.startswith(("torch.", *_GUARDS)):
            return name.startswith("shardproof.") and not name.startswith(_OF_USERS)
        frame = frame.f_back  # type: ignore[assignment]  # the outermost frame has none
    return False


def _kept(place: Placement | None, x: Tensor, y: Tensor) -> Placement | None:
    """The placement of `x`, if `y` can have the same."""
    return place if x.shape == y.shape else None


def _placed(layout: Layout) -> Placement:
    if layout.dim is None:
        return REPLICATE
    return shard(layout.dim, layout.held_indices, layout.shape[layout.dim])


def _updated(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
