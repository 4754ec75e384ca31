"""The arrows of `show`: who sends which piece to whom, held to the plans of the collectives."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardproof as sp
from shardproof import comm
from shardproof.axis import Axis
from shardproof.comm.plans import scatter_plan, tree_plan
from shardproof.comm.split import Split
from shardproof.leaves import Cut, share
from shardproof.scheme import Scheme
from shardproof.showing.actions import actions_of
from shardproof.showing.arrows import Arrow, arrow_sentences, arrows_of
from shardproof.showing.scenes import Scene, StepView, view_of
from shardproof.tree import nodes_of_run

DEGREES = [3, 8]
LEAVES = 8


def view(work: Callable[[Axis], Any], degree: int) -> StepView:
    trace = sp.Trace(values=True)
    sp.launch(work, degree=degree, trace=trace)
    return view_of(trace, title="x")


def meeting(view: StepView) -> Scene:
    """The one scene in which the ranks meet."""
    (scene,) = [scene for scene in view.scenes if scene.is_collective]
    return scene


def nodes_of(axis: Axis, cut: Cut, shape: tuple[int, ...], dtype: torch.dtype) -> dict[Any, Any]:
    run = cut.run(axis.rank)
    return {
        node: torch.arange(math.prod(shape), dtype=dtype).view(shape) + 100 * node[0]
        for node in nodes_of_run(cut.num_leaves, run)
    }


def reduced(degree: int, shape: tuple[int, ...] = (3, 5)) -> tuple[Arrow, ...]:
    cut = Cut(16, leaves=LEAVES, degree=degree)

    def work(axis: Axis) -> None:
        nodes = nodes_of(axis, cut, shape, torch.float32)
        like = torch.empty(0)
        comm.all_reduce_nodes(
            nodes, axis, cut=cut, shape=shape, like=like, direction="forward", who="a"
        )

    scene = meeting(view(work, degree))
    return scene.arrows


def scattered(degree: int, columns: int = 5) -> tuple[Arrow, ...]:
    cut = Cut(16, leaves=LEAVES, degree=degree)
    to = Cut(columns, leaves=LEAVES, degree=degree)

    def work(axis: Axis) -> None:
        nodes = nodes_of(axis, cut, (4, columns), torch.float32)
        comm.reduce_scatter_nodes(
            nodes, axis, cut=cut, into=comm.ShardOf((4, columns), 1, to), like=torch.empty(0),
            direction="backward", who="a",
        )  # fmt: skip

    scene = meeting(view(work, degree))
    return scene.arrows


def of(arrows: tuple[Arrow, ...], sender: int, stage: int = 1) -> dict[int, Arrow]:
    return {a.receiver: a for a in arrows if a.sender == sender and a.stage == stage}


@pytest.mark.parametrize("degree", DEGREES)
def test_an_all_reduce_sends_slices_of_nodes_and_then_finished_slices(degree: int) -> None:
    arrows = reduced(degree)
    cut, slices = Cut(16, leaves=LEAVES, degree=degree), share(15, degree)
    for rank in range(degree):
        plan = tree_plan("forward", "a", (3, 5), torch.float32, cut, rank)
        assert sum(a.num_bytes for a in arrows if a.sender == rank) == plan.sent_bytes
        first, second = of(arrows, rank), of(arrows, rank, stage=2)
        assert set(first) == set(second) == set(range(degree)) - {rank}
        for receiver in first:
            # The receiver adds its own slice, and so gets that slice of every node.
            shapes = [piece.shape for piece in first[receiver].sent_pieces]
            assert shapes == [(len(slices[receiver]),)] * plan.order.counts[rank]
            assert [piece.shape for piece in second[receiver].sent_pieces] == [(len(slices[rank]),)]
            assert first[receiver].num_bytes == 4 * sum(math.prod(shape) for shape in shapes)


def test_what_travels_is_named_with_its_numbers() -> None:
    lines = [
        f"rank {arrow.sender} to {text}" for arrow, text in arrow_sentences(reduced(2, (2, 2)))
    ]
    assert lines == [
        "rank 0 to rank 1: elements 2-3 of leaves 0-3 [2, 3], 8 bytes",
        "rank 1 to rank 0: elements 0-1 of leaves 4-7 [400, 401], 8 bytes",
        "rank 0 to rank 1: elements 0-1 of the finished sum of y [400, 402], 8 bytes",
        "rank 1 to rank 0: elements 2-3 of the finished sum of y [404, 406], 8 bytes",
    ]
    brief = [text for _, text in arrow_sentences(reduced(3), is_brief=True)]
    assert brief[0] == "ranks 1 and 2: to each its slice of leaves 0-1 and leaf 2, 80 bytes in all"


def test_nothing_is_sent_of_an_empty_slice() -> None:
    arrows = reduced(3, (1, 2))
    assert {a.receiver for a in arrows if a.stage == 1} == {0, 1}
    assert {a.sender for a in arrows if a.stage == 2} == {0, 1}


@pytest.mark.parametrize("degree", DEGREES)
def test_a_reduce_scatter_sends_each_rank_its_own_columns(degree: int) -> None:
    arrows = scattered(degree)
    cut = Cut(16, leaves=LEAVES, degree=degree)
    to = Cut(5, leaves=LEAVES, degree=degree)
    assert all(arrow.stage == 1 for arrow in arrows)
    for rank in range(degree):
        into = comm.ShardOf((4, 5), 1, to)
        plan = scatter_plan("backward", "a", into, torch.float32, cut, rank)
        found = of(arrows, rank)
        assert sum(arrow.num_bytes for arrow in found.values()) == plan.sent_bytes
        assert set(found) == {each for each in range(degree) if to.owned(each) and each != rank}
        for receiver, arrow in found.items():
            width = len(to.owned(receiver))
            assert {piece.shape for piece in arrow.sent_pieces} == {(4, width)}
            assert len(arrow.sent_pieces) == plan.order.counts[rank]


def test_the_numbers_of_a_window_are_those_of_its_columns() -> None:
    (arrow,) = [a for a in scattered(8, columns=8) if (a.sender, a.receiver) == (2, 5)]
    (piece,) = arrow.sent_pieces
    assert (piece.name, piece.piece) == ("leaf 2", "column 5")
    assert piece.numbers == ("205", "213", "221", "229")


def test_the_numbers_of_a_window_of_rows_are_those_of_its_rows() -> None:
    cut, to = (Cut(size, leaves=LEAVES, degree=2) for size in (16, 3))

    def work(axis: Axis) -> None:
        nodes = nodes_of(axis, cut, (3, 2), torch.float32)
        comm.reduce_scatter_nodes(
            nodes, axis, cut=cut, into=comm.ShardOf((3, 2), 0, to), like=torch.empty(0),
            direction="backward", who="a",
        )  # fmt: skip

    scene = meeting(view(work, 2))
    assert [text for _, text in arrow_sentences(scene.arrows)] == [
        "rank 1: row 2 of leaves 0-3 [4, 5], 8 bytes",
        "rank 0: rows 0-1 of leaves 4-7 [400, 401, 402, 403], 16 bytes",
    ]


@pytest.mark.parametrize("degree", DEGREES)
def test_a_gather_sends_each_part_whole_to_every_other_rank(degree: int) -> None:
    cut = Cut(6, leaves=LEAVES, degree=degree)

    def work(axis: Axis) -> None:
        x = torch.ones(2, len(cut.owned(axis.rank)))
        comm.all_gather(x, axis, dim=1, cut=cut, direction="forward", who="a")

    scene = meeting(view(work, degree))
    owners = [rank for rank in range(degree) if cut.owned(rank)]
    for rank in range(degree):
        found = of(scene.arrows, rank)
        assert set(found) == (set(range(degree)) - {rank} if rank in owners else set())
        for arrow in found.values():
            assert [piece.shape for piece in arrow.sent_pieces] == [(2, len(cut.owned(rank)))]
            assert arrow.num_bytes == 8 * len(cut.owned(rank))


def test_where_the_transport_decides_only_totals_are_told() -> None:
    def work(axis: Axis) -> None:
        comm.all_reduce(torch.ones(4), axis, direction="forward", who="a")

    scene = meeting(view(work, 2))
    assert scene.arrows == ()
    assert "Each rank sends 16 bytes. The transport decides" in " ".join(scene.sentences)
    assert scene.formula == "y = the sum of the ranks' parts, in the transport's own order"


def test_products_of_nodes_are_one_scene_with_the_whole_shards() -> None:
    def work(axis: Axis) -> None:
        row = sp.RowParallelLinear(40, 3, axis=axis, scheme=Scheme(), name="down")
        row(torch.ones(2, row.weight.shape[1]))

    scenes = view(work, 3).scenes
    products = [scene for scene in scenes if scene.title == "down: product"]
    (scene,) = products
    x, weight, y = scene.tensors
    assert [piece.part.held for piece in weight.pieces] == [(0, 15), (15, 30), (30, 40)]
    assert [piece.part.shape for piece in x.pieces] == [(2, 15), (2, 15), (2, 10)]
    for piece in weight.pieces:
        assert torch.tensor(piece.part.values).shape == piece.part.shape
    assert [piece.part.node for piece in y.pieces] == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 8)]
    assert scene.formula == (
        "y = x @ weight.T for each of: leaves 0-1, leaf 2, leaf 3, leaves 4-5, leaves 6-7"
    )


def test_two_sums_that_run_at_once_keep_their_own_additions() -> None:
    trace = sp.Trace()
    cut = Cut(16, leaves=LEAVES, degree=2)

    def work(axis: Axis) -> None:
        split = Split(axis, cut, sp.Scheme(), "a")
        started = [
            split.start_sum(
                [*nodes_of(axis, cut, (2, 2 + more), torch.float32).values()],
                shape=(2, 2 + more), like=torch.empty(0), direction="forward",
            )
            for more in (0, 1)
        ]  # fmt: skip
        for each in started:
            each.wait()

    sp.launch(work, degree=2, trace=trace)
    actions = [action for action in actions_of(trace.ranks[0]) if action.first.is_collective]
    assert [[step.operation for step in action.steps] for action in actions] == [
        ["all_reduce", "addition"]
    ] * 2
    shapes = [[step.output.shape for step in m.steps if step.output] for m in actions]
    assert shapes == [[(2, 2)] * 2, [(2, 3)] * 2]
    assert arrows_of(actions) != ()
