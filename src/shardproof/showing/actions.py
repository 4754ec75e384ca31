"""What one rank does in a scene: a step of its trace, or some that belong together.

The products of the nodes of one sum are one action, and so are a collective that adds and its
additions, which a trace has as steps of their own.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardproof.trace.step import CORNER, Part, TraceStep
from shardproof.tree import node_name

SUMMED = ("all_reduce", "reduce_scatter")


@dataclass(frozen=True)
class RankAction:
    """What one rank does in a scene.

    Attributes:
        steps: of its trace; the first says what is done.
        inputs: what is read; of the products of several nodes, all that they read together.
        outputs: what is made; a product has one for each node.
    """

    steps: tuple[TraceStep, ...]
    inputs: tuple[Part, ...]
    outputs: tuple[Part, ...]

    @property
    def first(self) -> TraceStep:
        """The step that says what is done."""
        return self.steps[0]

    @property
    def addition(self) -> str:
        """Which parts are added in which order; "" if nothing is, or if it is not known."""
        return next((s.detail for s in self.steps[1:] if s.operation == "addition"), "")

    @property
    def held_bytes(self) -> int:
        """Bytes that the rank holds after it."""
        return (self.first if self.first.is_collective else self.steps[-1]).held_bytes


def actions_of(steps: Sequence[TraceStep]) -> list[RankAction]:
    """The steps of one rank, in their order, as actions."""
    groups: list[list[TraceStep]] = []
    waiting: dict[tuple[str, str], deque[list[TraceStep]]] = defaultdict(deque)
    for step in steps:
        key = step.phase, step.module
        if step.operation == "addition" and not step.inputs:
            if waiting[key]:  # sums end in the order in which they were started
                waiting[key].popleft().append(step)
                continue
            if groups and _is_product_of(groups[-1][-1], key):  # one rank alone has all leaves
                groups[-1].append(step)
                continue
        if groups and _continues(groups[-1][-1], step):
            groups[-1].append(step)
            continue
        groups.append([step])
        if step.is_collective and step.operation in SUMMED:
            waiting[key].append(groups[-1])
    return _named([_action(group) for group in groups])


def base_name(part: Part) -> str:
    """The name of the sum that a node belongs to; the name of any other tensor."""
    return part.name if part.node is None else part.name.removesuffix(f", {node_name(part.node)}")


def _is_product_of(step: TraceStep, key: tuple[str, str]) -> bool:
    return step.operation == "product" and (step.phase, step.module) == key


def _continues(before: TraceStep, step: TraceStep) -> bool:
    """Whether both are products of nodes of the same sum."""
    if not _is_product_of(step, (before.phase, before.module)) or before.operation != "product":
        return False
    if before.output is None or step.output is None:
        return False
    first, second = before.output.node, step.output.node
    return first is not None and second is not None and first[1] <= second[0]


def _action(steps: Sequence[TraceStep]) -> RankAction:
    first = steps[0]
    if first.is_collective or len(steps) == 1 or steps[1].operation == "addition":
        single = () if first.output is None else (first.output,)
        return RankAction(tuple(steps), inputs=first.inputs, outputs=single)
    inputs = [_joined([step.inputs[place] for step in steps]) for place in range(len(first.inputs))]
    outputs = tuple(step.output for step in steps if step.output)
    return RankAction(tuple(steps), inputs=tuple(inputs), outputs=outputs)


def _named(actions: Sequence[RankAction]) -> list[RankAction]:
    """Give what is gathered one name before and after: that of the product that made it."""
    products: dict[tuple[str, str], Part] = {}
    named = []
    for action in actions:
        first = action.first
        key = first.phase, first.module
        if first.operation == "all_gather":
            product, operand = products.get(key), action.inputs[0]
            name = (
                product.name
                if product is not None and product.shape == operand.shape
                else operand.name
            )
            action = replace(
                action,
                inputs=(replace(operand, name=name),),
                outputs=tuple(replace(part, name=name) for part in action.outputs),
            )
        elif first.operation in SUMMED and first.is_collective and action.outputs:
            name = action.outputs[0].name  # nodes have names of their own
            operands = (p if p.node else replace(p, name=name) for p in action.inputs)
            action = replace(action, inputs=tuple(operands))
        elif first.operation == "product" and action.outputs:
            products[key] = action.outputs[0]
        named.append(action)
    return named


def _joined(parts: Sequence[Part]) -> Part:
    """Join the parts of one shard; a tensor that is the same in all steps stays."""
    first, last = parts[0], parts[-1]
    dim = first.dim
    if dim is None or first.held is None or last.held is None or first.held == last.held:
        return first
    length = sum(part.shape[dim] for part in parts)
    values = None
    if all(part.values is not None for part in parts):
        values = _side_by_side([part.values for part in parts], dim)
    return replace(
        first,
        shape=(*first.shape[:dim], length, *first.shape[dim + 1 :]),
        held=(first.held[0], last.held[1]),
        num_bytes=sum(part.num_bytes for part in parts),
        values=values,
        corner=None if values is not None else _corner(parts, dim),
    )


def _corner(parts: Sequence[Part], dim: int) -> Any:
    """The corner of the whole shard, from what is known of its parts."""
    num_dims = len(parts[0].shape)
    corners = []
    for part in parts:
        numbers = part.values if part.values is not None else part.corner
        if numbers is None:
            return None
        corners.append(_cropped(numbers, num_dims))
        if part.shape[dim] > (CORNER if dim >= num_dims - 2 else 1):
            break  # what comes after it is not next to what is known of it
    return _cropped(_side_by_side(corners, dim), num_dims)


def _cropped(numbers: Any, num_dims: int) -> Any:
    if num_dims == 0:
        return numbers
    most = CORNER if num_dims <= 2 else 1
    return tuple(_cropped(each, num_dims - 1) for each in numbers[:most])


def _side_by_side(trees: Sequence[Any], dim: int) -> Any:
    """Nested tuples, one after the other along a dim."""
    if dim == 0:
        return tuple(each for tree in trees for each in tree)
    return tuple(_side_by_side(rows, dim - 1) for rows in zip(*trees, strict=True))
