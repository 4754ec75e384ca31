"""The order of additions, with the answers written out, symbol for symbol."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardproof.leaves import share
from shardproof.tree import Node, children, combine, nodes_of_run

V = TypeVar("V")
Add = Callable[[V, V, bool], V]

# Leaves -> the whole expression, as degree 1 evaluates it.
EXPRESSIONS = {
    1: "0",
    2: "(0+1)",
    3: "((0+1)+2)",
    5: "(((0+1)+(2+3))+4)",
    6: "(((0+1)+(2+3))+(4+5))",
    7: "(((0+1)+(2+3))+((4+5)+6))",
    8: "(((0+1)+(2+3))+((4+5)+(6+7)))",
    12: "((((0+1)+(2+3))+((4+5)+(6+7)))+((8+9)+(10+11)))",
}

# (leaves, degree) -> the nodes that each rank sends.
SENT = {
    (8, 1): [[(0, 8)]],
    (8, 2): [[(0, 4)], [(4, 8)]],
    (8, 3): [[(0, 2), (2, 3)], [(3, 4), (4, 6)], [(6, 8)]],
    (8, 4): [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 8)]],
    (8, 5): [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 7)], [(7, 8)]],
    (5, 2): [[(0, 2), (2, 3)], [(3, 4), (4, 5)]],
    (5, 3): [[(0, 2)], [(2, 4)], [(4, 5)]],
    (6, 2): [[(0, 2), (2, 3)], [(3, 4), (4, 6)]],
    (6, 3): [[(0, 2)], [(2, 4)], [(4, 6)]],
    (7, 2): [[(0, 4)], [(4, 7)]],
    (7, 3): [[(0, 2), (2, 3)], [(3, 4), (4, 5)], [(5, 6), (6, 7)]],
    (12, 2): [[(0, 4), (4, 6)], [(6, 8), (8, 12)]],
    (12, 3): [[(0, 4)], [(4, 8)], [(8, 12)]],
    (12, 5): [[(0, 2), (2, 3)], [(3, 4), (4, 6)], [(6, 8)], [(8, 10)], [(10, 12)]],
    (2, 4): [[(0, 1)], [(1, 2)], [], []],
}


def written(left: str, right: str, is_fresh: bool) -> str:
    return f"({left}+{right})"


def added(left: Tensor, right: Tensor, is_fresh: bool) -> Tensor:
    return left + right


def one_by_one(leaves: range, leaf: Callable[[int], V] = str) -> dict[Node, V]:
    return {(index, index + 1): leaf(index) for index in leaves}


def sent_by_all(
    leaves: int, degree: int, leaf: Callable[[int], V] = str, add: Add[V] = written
) -> dict[Node, V]:
    """What the ranks exchange: each sums its own nodes from its own leaves, and knows no others."""
    nodes: dict[Node, V] = {}
    for run in share(leaves, degree):
        for node in nodes_of_run(leaves, run):
            nodes[node] = combine(node, one_by_one(run, leaf), add)
    return nodes


def by_the_tree(
    leaves: int, degree: int, leaf: Callable[[int], V] = str, add: Add[V] = written
) -> V:
    return combine((0, leaves), sent_by_all(leaves, degree, leaf, add), add)


def by_rank_order(
    leaves: int, degree: int, leaf: Callable[[int], V] = str, add: Add[V] = written
) -> V:
    """What a plain all-reduce does: one sum per rank, added up in rank order."""

    def in_order(values: Sequence[V]) -> V:
        return functools.reduce(lambda left, right: add(left, right, False), values)

    return in_order([in_order([leaf(i) for i in run]) for run in share(leaves, degree)])


# -- answers written out ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ((0, 2), ((0, 1), (1, 2))),
        ((0, 3), ((0, 2), (2, 3))),
        ((0, 5), ((0, 4), (4, 5))),
        ((0, 6), ((0, 4), (4, 6))),
        ((0, 7), ((0, 4), (4, 7))),
        ((4, 7), ((4, 6), (6, 7))),
        ((0, 8), ((0, 4), (4, 8))),
        ((4, 8), ((4, 6), (6, 8))),
        ((0, 12), ((0, 8), (8, 12))),
        ((8, 12), ((8, 10), (10, 12))),
    ],
)
def test_children(node: Node, expected: tuple[Node, Node]) -> None:
    assert children(node) == expected


@pytest.mark.parametrize("leaves", EXPRESSIONS)
def test_expression_of_the_whole(leaves: int) -> None:
    assert combine((0, leaves), one_by_one(range(leaves)), written) == EXPRESSIONS[leaves]


@pytest.mark.parametrize(("leaves", "degree"), SENT)
def test_nodes_that_each_rank_sends(leaves: int, degree: int) -> None:
    runs = share(leaves, degree)
    assert [nodes_of_run(leaves, run) for run in runs] == SENT[leaves, degree]


def test_drawing_of_the_design_at_degree_3() -> None:
    nodes = sent_by_all(8, 3)
    assert nodes == {(0, 2): "(0+1)", (2, 3): "2", (3, 4): "3", (4, 6): "(4+5)", (6, 8): "(6+7)"}
    assert combine((0, 8), nodes, written) == EXPRESSIONS[8]


def test_an_empty_run_has_no_nodes() -> None:
    assert nodes_of_run(8, range(0)) == []
    assert nodes_of_run(8, range(8, 8)) == []


# -- the same expression at every degree -----------------------------------------------------------


@pytest.mark.parametrize("leaves", range(1, 25))
def test_every_degree_evaluates_the_same_expression(leaves: int) -> None:
    alone = combine((0, leaves), one_by_one(range(leaves)), written)
    for degree in range(1, leaves + 1):
        assert by_the_tree(leaves, degree) == alone


def test_degree_above_the_leaves_changes_nothing() -> None:
    # A dim of 5 units in a plan of 8 leaves: ranks 5 and up are idle.
    for degree in range(1, 9):
        assert by_the_tree(5, degree) == EXPRESSIONS[5]


@given(st.data())
def test_any_division_into_runs_evaluates_the_same_expression(data: st.DataObject) -> None:
    leaves = data.draw(st.integers(1, 40))
    borders = data.draw(st.sets(st.integers(0, leaves), max_size=12))
    bounds = sorted(borders | {0, leaves})
    nodes: dict[Node, str] = {}
    for start, stop in itertools.pairwise(bounds):
        run = range(start, stop)
        nodes |= {
            node: combine(node, one_by_one(run), written) for node in nodes_of_run(leaves, run)
        }
    alone = combine((0, leaves), one_by_one(range(leaves)), written)
    assert combine((0, leaves), nodes, written) == alone


def test_negative_control_rank_order_is_another_expression() -> None:
    assert by_rank_order(8, 3) == "((((0+1)+2)+((3+4)+5))+(6+7))"
    assert by_rank_order(8, 3) != by_the_tree(8, 3)
    assert len({by_rank_order(8, degree) for degree in range(1, 9)}) > 1
    assert len({by_the_tree(8, degree) for degree in range(1, 9)}) == 1


def test_the_same_bits_at_every_degree_and_other_bits_in_rank_order() -> None:
    values = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)).unbind()
    alone = by_the_tree(8, 1, values.__getitem__, added)
    for degree in range(2, 9):
        assert torch.equal(by_the_tree(8, degree, values.__getitem__, added), alone)
    assert not torch.equal(by_rank_order(8, 3, values.__getitem__, added), alone)


# -- nodes -----------------------------------------------------------------------------------------


@given(st.data())
def test_nodes_tile_their_run_and_are_few(data: st.DataObject) -> None:
    leaves = data.draw(st.integers(2, 200))
    start = data.draw(st.integers(0, leaves - 1))
    run = range(start, data.draw(st.integers(start + 1, leaves)))

    nodes = nodes_of_run(leaves, run)

    assert [leaf for node in nodes for leaf in range(*node)] == list(run)
    assert len(nodes) <= 2 * math.log2(leaves)
    for left, right in itertools.pairwise(nodes):
        assert (left, right) not in parents(leaves), "two siblings are one larger node"


def parents(leaves: int) -> set[tuple[Node, Node]]:
    pairs, waiting = set(), [(0, leaves)]
    while waiting:
        start, stop = waiting.pop()
        if stop - start > 1:
            pair = children((start, stop))
            pairs.add(pair)
            waiting.extend(pair)
    return pairs


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_powers_of_two_send_one_node_each(degree: int) -> None:
    assert all(len(nodes_of_run(8, run)) == 1 for run in share(8, degree))


# -- what may be overwritten -----------------------------------------------------------------------


def adds(node: Node, values: Mapping[Node, str]) -> list[tuple[str, str, bool]]:
    """Every addition that `combine` asks for, in order."""
    seen: list[tuple[str, str, bool]] = []

    def record(left: str, right: str, is_fresh: bool) -> str:
        seen.append((left, right, is_fresh))
        return written(left, right, is_fresh)

    combine(node, values, record)
    return seen


def test_only_a_result_of_add_is_fresh() -> None:
    assert adds((0, 6), one_by_one(range(6))) == [
        ("0", "1", False),
        ("2", "3", False),
        ("(0+1)", "(2+3)", True),
        ("4", "5", False),
        ("((0+1)+(2+3))", "(4+5)", True),
    ]


def test_a_node_that_was_given_is_not_fresh() -> None:
    assert adds((0, 8), {(0, 4): "a", (4, 8): "b"}) == [("a", "b", False)]
    nodes = {(0, 2): "a", (2, 3): "b", (3, 4): "c", (4, 6): "d", (6, 8): "e"}
    assert adds((0, 8), nodes) == [
        ("b", "c", False),
        ("a", "(b+c)", False),  # the left one was given; a fresh right one may not be overwritten
        ("d", "e", False),
        ("(a+(b+c))", "(d+e)", True),
    ]


def test_a_node_that_was_given_is_returned_as_it_is() -> None:
    value = torch.ones(3)
    assert combine((0, 8), {(0, 8): value}, in_place_if_fresh) is value
    assert adds((0, 8), {(0, 8): "a"}) == []


def in_place_if_fresh(left: Tensor, right: Tensor, is_fresh: bool) -> Tensor:
    return left.add_(right) if is_fresh else left + right


def always_in_place(left: Tensor, right: Tensor, is_fresh: bool) -> Tensor:
    return left.add_(right)


def overwritten(
    leaves: int, degree: int, add: Callable[[Tensor, Tensor, bool], Tensor]
) -> list[Node]:
    """Which of the given values differ after `combine`; also checks its result."""
    values = {
        node: torch.tensor([1.0 + node[0], 0.5 * node[1]])
        for run in share(leaves, degree)
        for node in nodes_of_run(leaves, run)
    }
    before = {node: value.clone() for node, value in values.items()}
    total = combine((0, leaves), values, add)
    torch.testing.assert_close(total, torch.stack(list(before.values())).sum(0))
    return [node for node, value in values.items() if not torch.equal(value, before[node])]


@pytest.mark.parametrize("leaves", range(1, 14))
def test_combine_never_overwrites_what_it_was_given(leaves: int) -> None:
    for degree in range(1, leaves + 1):
        assert overwritten(leaves, degree, in_place_if_fresh) == []


def test_negative_control_adding_always_in_place_overwrites() -> None:
    assert overwritten(8, 3, always_in_place) == [(0, 2), (2, 3), (4, 6)]
