"""The canonical tree, which fixes the order in which partial sums are added at every degree.

A node is the run of leaves `(start, stop)` that it sums. A node of more than one leaf is the sum
of two: its first leaves, as many as the largest power of two below its length, and the rest.
The tree depends only on the number of leaves. A rank adds the nodes that lie wholly inside its
own run of leaves (`nodes_of_run`), and `combine` makes the remaining additions.
This module knows no ranks and no transports; values may be anything that can be added.

See also: Hallberg and Adcroft 2014 on sums that do not depend on the number of processors.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from shardproof.errors import ShapeError

Node = tuple[int, int]
Value = TypeVar("Value")


def children(node: Node) -> tuple[Node, Node]:
    """The two nodes whose sum is `node`.

    >>> children((0, 6))
    ((0, 4), (4, 6))
    """
    start, stop = node
    length = stop - start
    if length < 2:
        raise ShapeError(f"node {node} is a leaf or less, and has no children.")
    middle = start + (1 << (length - 1).bit_length() - 1)
    return (start, middle), (middle, stop)


def nodes_of_run(num_leaves: int, run: range) -> list[Node]:
    """The largest nodes that lie wholly inside a contiguous run of leaves, left to right.

    >>> nodes_of_run(8, range(3, 6))
    [(3, 4), (4, 6)]
    """

    def visit(node: Node) -> list[Node]:
        start, stop = node
        if stop <= run.start or run.stop <= start:
            return []
        if run.start <= start and stop <= run.stop:
            return [node]
        left, right = children(node)
        return visit(left) + visit(right)

    return visit((0, num_leaves)) if len(run) else []


def combine(
    node: Node, values: Mapping[Node, Value], add: Callable[[Value, Value, bool], Value]
) -> Value:
    """Compute the sum of `node` by the tree, from the nodes in `values`.

    Args:
        node: the node to compute; `(0, num_leaves)` for the whole sum.
        values: sums that are known; together they cover `node`.
        add: `add(left, right, is_fresh)`; if `is_fresh`, `left` is itself a result of `add` and
            may be overwritten.
    """

    def visit(node: Node) -> tuple[Value, bool]:
        if node in values:
            return values[node], False
        left, right = children(node)
        (left_value, is_fresh), (right_value, _) = visit(left), visit(right)
        return add(left_value, right_value, is_fresh), True

    return visit(node)[0]


def add_run(leaves: Iterable[Tensor], run: range, num_leaves: int) -> dict[Node, Tensor]:
    """The nodes that a rank can add by itself, from its leaves.

    Args:
        leaves: a tensor for each leaf of `run`; they are not written into.
        run: a contiguous run of leaves.
        num_leaves: number of leaves of the whole sum.
    """
    values = {(leaf, leaf + 1): value for leaf, value in zip(run, leaves, strict=True)}
    return {node: combine(node, values, add_tensors) for node in nodes_of_run(num_leaves, run)}


def sum_leaves(leaves: Iterable[Tensor]) -> Tensor:
    """The sum of all leaves, which one rank has; they are not written into."""
    every = list(leaves)
    return add_run(every, range(len(every)), len(every))[0, len(every)]


def steps(node: Node, numbers: Mapping[Node, int]) -> list[int]:
    """The additions of `combine` as a postfix program, for the C code.

    Args:
        node: the node to compute.
        numbers: node -> its number; together they cover `node`.
    Returns:
        The program: a number pushes that node, and -1 adds the two topmost values (the lower one is
        the left operand).

    >>> steps((0, 4), {(0, 2): 0, (2, 3): 1, (3, 4): 2})
    [0, 1, 2, -1, -1]
    """
    if node in numbers:
        return [numbers[node]]
    left, right = children(node)
    return [*steps(left, numbers), *steps(right, numbers), -1]


def node_name(node: Node) -> str:
    """The name of a node for people.

    >>> node_name((0, 4)), node_name((5, 6))
    ('leaves 0-3', 'leaf 5')
    """
    start, stop = node
    return f"leaf {start}" if stop - start == 1 else f"leaves {start}-{stop - 1}"


def formula(node: Node, available: Container[Node]) -> str:
    """The additions of `combine` as a formula.

    Args:
        node: the node to compute.
        available: the nodes that are known; together they cover `node`.

    >>> formula((0, 4), {(0, 2), (2, 3), (3, 4)})
    'leaves 0-1 + (leaf 2 + leaf 3)'
    """
    if node in available:
        return node_name(node)
    sides = (formula(side, available) for side in children(node))
    return " + ".join(f"({side})" if "+" in side else side for side in sides)


def add_tensors(left: Tensor, right: Tensor, is_fresh: bool) -> Tensor:
    """The `add` of `combine` for tensors; it writes into `left` only if that is fresh."""
    return left.add_(right) if is_fresh else left + right
