"""Collectives on plain tensors: values, bits, what they cost, and ranks that disagree."""

import functools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from invariance import bits_equal
from places import ENGINES, EVERYWHERE, TOGETHER, Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.comm.runs_of_indices import all_gather_sizes
from shardproof.errors import MismatchError, ShapeError
from shardproof.leaves import Cut
from shardproof.tree import Node, combine, nodes_of_run

SIZES = (64, 11, 3, 1)  # uneven at 2 and 3 ranks, some ranks empty at 2, 3 and 8
SPECIAL = (-0.0, float("nan"), float("inf"), float("-inf"), 1e-45, 3.4e38)


def whole(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def partial_of(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, so that no order of additions rounds."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def part(x: Tensor, cut: Cut, rank: int, dim: int) -> Tensor:
    """What a rank owns, as a view: not contiguous unless `dim` is 0."""
    owned = cut.owned(rank)
    return x.narrow(dim, owned.start, len(owned))


def summed(axis: Axis, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of all ranks' partials."""
    return torch.stack([partial_of(rank, *shape, dtype=dtype) for rank in range(axis.size)]).sum(0)


def leaf_values(count: int, *shape: int) -> dict[Node, Tensor]:
    """A value per leaf, of sizes so different that every order of additions rounds another way."""
    return {
        (leaf, leaf + 1): whole(*shape, seed=leaf) * 10.0 ** (leaf % 5 - 2) for leaf in range(count)
    }


def own_nodes(cut: Cut, rank: int, *shape: int) -> dict[Node, Tensor]:
    """This rank's canonical nodes of `leaf_values`."""
    leaves = leaf_values(cut.num_leaves, *shape)
    nodes = nodes_of_run(cut.num_leaves, cut.run(rank))
    return {node: combine(node, leaves, lambda a, b, _: a + b).clone() for node in nodes}


def check_all_gather(axis: Axis) -> None:
    for size in SIZES:
        cut = Cut(size, 8, axis.size)
        for dim, shape in ((0, (size, 5)), (1, (4, size)), (-1, (2, 3, size)), (1, (2, size, 3))):
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                full = (whole(*shape) * 9).to(dtype)
                x = part(full, cut, axis.rank, dim)
                before = x.clone()
                y = comm.all_gather(x, axis, dim=dim, cut=cut, direction="forward")
                assert torch.equal(y, full), (size, dim, dtype)
                assert y.is_contiguous()
                y.fill_(7)
                assert torch.equal(x, before), "the input is another tensor than the result"


def check_all_reduce(axis: Axis) -> None:
    for shape in ((), (0, 3), (5,), (3, 7), (2, 3, 4), (130, 130)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = partial_of(axis.rank, *shape, dtype=dtype)
            for given in (x, x.t().contiguous().t() if x.dim() == 2 else x, x.expand(shape)):
                y = comm.all_reduce(given, axis, direction="forward")
                assert torch.equal(y, summed(axis, *shape, dtype=dtype)), (shape, dtype)
                y.fill_(7)
            assert torch.equal(x, partial_of(axis.rank, *shape, dtype=dtype))


def check_reduce_scatter(axis: Axis) -> None:
    for size in SIZES:
        cut = Cut(size, 8, axis.size)
        for dim, shape in ((0, (size, 5)), (1, (4, size)), (-1, (2, 3, size))):
            for dtype in (torch.float32, torch.bfloat16):
                x = partial_of(axis.rank, *shape, dtype=dtype)
                given = x.transpose(0, -1).contiguous().transpose(0, -1)
                before = given.clone()
                y = comm.reduce_scatter(given, axis, dim=dim, cut=cut, direction="forward")
                total = summed(axis, *shape, dtype=dtype)
                assert torch.equal(y, part(total, cut, axis.rank, dim)), (size, dim, dtype)
                y.fill_(7)
                assert torch.equal(given, before)


def check_gather(axis: Axis) -> None:
    sizes = [(3 * rank + 1) % 5 for rank in range(axis.size)]
    for dst in range(axis.size):
        x = partial_of(axis.rank, sizes[axis.rank])
        y = comm.gather(x, axis, sizes=sizes, dst=dst, direction="prover")
        if axis.rank == dst:
            assert y is not None
            parts = [partial_of(rank, length) for rank, length in enumerate(sizes)]
            assert torch.equal(y, torch.cat(parts))
            y.fill_(7)
            assert torch.equal(x, partial_of(axis.rank, sizes[axis.rank]))
        else:
            assert y is None


@EVERYWHERE
@pytest.mark.parametrize(
    "check", [check_all_gather, check_all_reduce, check_reduce_scatter, check_gather]
)
def test_values_are_those_of_plain_torch(
    pool: Pool, degree: int, engine: str, check: Callable[[Axis], None]
) -> None:
    pool(degree, engine).run(check)


def tree_sums(axis: Axis) -> list[Tensor]:
    """Sums by the tree over several numbers of leaves, and slices of them put together."""
    found = []
    for size, leaves, shape in (
        (64, 8, (9, 13)),
        (5, 8, (4,)),
        (40, 12, (300, 70)),
        (1, 8, (2, 3)),
        (16, 16, ()),
    ):
        cut = Cut(size, leaves, axis.size)
        nodes = own_nodes(cut, axis.rank, *shape)
        y = comm.all_reduce_nodes(
            nodes, axis, cut=cut, shape=shape, like=torch.empty(0), direction="forward"
        )
        assert y.shape == shape
        found.append(y)
    return found


def rank_order_sum(axis: Axis) -> Tensor:
    """What plain tensor parallelism does: add what each rank has already added up."""
    cut = Cut(64, 8, axis.size)
    leaves = leaf_values(8, 9, 13)
    mine = torch.stack([leaves[leaf, leaf + 1] for leaf in cut.run(axis.rank)])
    return comm.all_reduce(mine.sum(0), axis, direction="forward")


@EVERYWHERE
def test_tree_sums_have_the_same_bits_at_every_degree(pool: Pool, degree: int, engine: str) -> None:
    alone = tree_sums(Axis.solo())
    for found in pool(degree, engine).run(tree_sums):
        assert all(bits_equal(a, b) for a, b in zip(found, alone, strict=True))


def test_tree_sums_are_right_and_rank_order_changes_the_bits(pool: Pool) -> None:
    exact = torch.stack([value.double() for value in leaf_values(8, 9, 13).values()]).sum(0)
    ours = tree_sums(Axis.solo())[0]
    assert (ours.double() - exact).abs().max() < 1e-5 * exact.abs().max()
    by_rank = [pool(degree, "threads").run(rank_order_sum)[0] for degree in (1, 2, 3, 8)]
    assert all((x.double() - exact).abs().max() < 1e-5 * exact.abs().max() for x in by_rank)
    assert not all(bits_equal(by_rank[0], other) for other in by_rank[1:])


def scattered_tree_sums(axis: Axis) -> list[bool]:
    """Whether each owned part of the tree's sum has the bits of the whole sum."""
    right = []
    for dim, shape in ((0, (11, 4)), (1, (5, 64)), (1, (2, 3)), (-1, (3, 1))):
        cut, dim_cut = Cut(40, 8, axis.size), Cut(shape[dim], 8, axis.size)
        same = {"axis": axis, "cut": cut, "direction": "backward"}
        for dtype in (torch.float32, torch.bfloat16):
            like = torch.empty(0, dtype=dtype)
            y = comm.all_reduce_nodes(
                own_nodes(cut, axis.rank, *shape), like=like, shape=shape, **same
            )
            mine = comm.reduce_scatter_nodes(
                own_nodes(cut, axis.rank, *shape),
                like=like,
                into=comm.ShardOf(shape, dim, dim_cut),
                **same,
            )
            right.append(bits_equal(mine, part(y, dim_cut, axis.rank, dim)))
    return right


@EVERYWHERE
def test_a_scattered_tree_sum_is_a_part_of_the_whole(pool: Pool, degree: int, engine: str) -> None:
    for right in pool(degree, engine).run(scattered_tree_sums):
        assert len(right) == 8
        assert all(right)


def bf16_sum(axis: Axis) -> Tensor:
    cut = Cut(64, 8, axis.size)
    like = torch.empty(0, dtype=torch.bfloat16)
    nodes = own_nodes(cut, axis.rank, 9, 13)
    return comm.all_reduce_nodes(
        nodes, axis, cut=cut, shape=(9, 13), like=like, direction="forward"
    )


@EVERYWHERE
def test_bf16_is_added_in_fp32_and_rounded_once(pool: Pool, degree: int, engine: str) -> None:
    wide = tree_sums(Axis.solo())[0]
    for found in pool(degree, engine).run(bf16_sum):
        assert bits_equal(found, wide.bfloat16())
    narrow = {node: value.bfloat16() for node, value in leaf_values(8, 9, 13).items()}
    assert not bits_equal(wide.bfloat16(), combine((0, 8), narrow, lambda a, b, _: a + b))


def special_values(axis: Axis) -> list[Tensor]:
    """-0.0, NaN, infinities and denormals through every collective."""
    x = torch.tensor(SPECIAL)
    cut = Cut(len(SPECIAL), 8, axis.size)
    leaves = {(leaf, leaf + 1): x.clone() for leaf in cut.run(axis.rank)}
    nodes = {
        node: combine(node, leaves, lambda a, b, _: a + b)
        for node in nodes_of_run(cut.num_leaves, cut.run(axis.rank))
    }
    mixed = {node: value * (-1) ** node[0] for node, value in leaves.items()}
    mixed = {node: combine(node, mixed, lambda a, b, _: a + b) for node in nodes}
    same = {"axis": axis, "cut": cut, "shape": x.shape, "like": x, "direction": "forward"}
    return [
        comm.all_gather(part(x, cut, axis.rank, 0), axis, dim=0, cut=cut, direction="forward"),
        comm.all_reduce_nodes(nodes, **same),
        comm.all_reduce_nodes(mixed, **same),
    ]


@EVERYWHERE
def test_special_values_travel_as_in_plain_arithmetic(pool: Pool, degree: int, engine: str) -> None:
    alone = special_values(Axis.solo())
    assert bits_equal(alone[0], torch.tensor(SPECIAL))
    assert torch.signbit(alone[1])[0], "-0.0 six times is -0.0"
    assert not torch.signbit(alone[2])[0], "-0.0 and 0.0 are 0.0"
    assert alone[1].isnan().tolist() == [False, True, False, False, False, False]
    assert alone[2].isnan().tolist() == [False, True, True, True, False, False]
    for found in pool(degree, engine).run(special_values):
        for a, b in zip(found, alone, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert bits_equal(a.nan_to_num(1), b.nan_to_num(1))


def overwritten_at_once(axis: Axis) -> list[Tensor]:
    """The results of a rank that comes late, while the other one writes its inputs again."""
    cut = Cut(12, 8, axis.size)
    results = []
    for act in (
        lambda x: comm.all_gather(
            x[: len(cut.owned(axis.rank))], axis, dim=0, cut=cut, direction="forward"
        ),
        lambda x: comm.all_reduce(x, axis, direction="forward"),
        lambda x: comm.reduce_scatter(x, axis, dim=0, cut=cut, direction="forward"),
        lambda x: comm.gather(
            x[0], axis, sizes=[4] * axis.size, dst=axis.size - 1, direction="prover"
        ),
    ):
        x = whole(12, 4)
        if axis.rank:
            time.sleep(0.05)
        y = act(x)
        results += [] if y is None else [y]
        x.fill_(float("nan"))
    return results


@EVERYWHERE
def test_an_input_may_be_written_again_at_once(pool: Pool, degree: int, engine: str) -> None:
    for found in pool(degree, engine).run(overwritten_at_once):
        assert not any(y.isnan().any() for y in found)


def costs(axis: Axis) -> dict[str, dict[str, dict[str, int]]]:
    cut = Cut(64, 8, axis.size)
    x = whole(64, 4)
    comm.all_gather(part(x, cut, axis.rank, 0), axis, dim=0, cut=cut, direction="forward")
    comm.all_reduce(x, axis, direction="backward")
    comm.reduce_scatter(x, axis, dim=0, cut=cut, direction="backward")
    same = {"axis": axis, "cut": cut, "shape": x.shape, "like": x}
    nodes = own_nodes(cut, axis.rank, *x.shape)
    comm.all_reduce_nodes(nodes, direction="update", **same)
    comm.gather(x[0], axis, sizes=[4] * axis.size, dst=0, direction="prover")
    return axis.transport.ledger.as_dict()


def row(calls: int, message: int, sent: int) -> dict[str, int]:
    return {"calls": calls, "message_bytes": message, "sent_bytes": sent}


@ENGINES
def test_the_ledger_counts_calls_and_bytes(pool: Pool, engine: str) -> None:
    """At powers of two the tree sends what a ring sends: 2 (R - 1) / R of the message."""
    full = 64 * 4 * 4
    first, second = pool(2, engine).run(costs)
    assert second == {
        "forward": {"all_gather": row(1, full, full // 2)},
        "backward": {
            "all_reduce": row(1, full, full),
            "reduce_scatter": row(1, full, full // 2),
        },
        "update": {"all_reduce": row(1, full, full)},
        "prover": {"gather": row(1, 32, 16)},
    }
    assert first == second | {"prover": {"gather": row(1, 32, 0)}}


def test_degree_1_communicates_nothing() -> None:
    assert costs(Axis.solo()) == {}


def disagreement(axis: Axis, what: str) -> str:
    """The message that this rank gets when rank 0 does something else than rank 1."""
    first = axis.rank == 0
    cut = Cut(4, 8, axis.size)
    x = whole(4, 4)
    send = functools.partial(comm.all_reduce, axis=axis, direction="forward", who="up")
    join = functools.partial(comm.all_gather, axis=axis, cut=cut, direction="forward", who="up")
    acts: dict[str, Callable[[], object]] = {
        "shape": lambda: send(whole(3, 4) if first else whole(4, 3)),
        "dtype": lambda: send(x if first else x.bfloat16()),
        "kind": lambda: send(x) if first else join(x[: len(cut.owned(axis.rank))], dim=0),
        "direction": lambda: comm.all_reduce(
            x, axis, direction="forward" if first else "backward", who="up"
        ),
        "dim": lambda: join(part(x, cut, axis.rank, 0 if first else 1), dim=0 if first else 1),
        "who": lambda: comm.all_reduce(x, axis, direction="forward", who="up" if first else "down"),
    }
    with pytest.raises(MismatchError) as caught:
        acts[what]()
    return str(caught.value)


BOTH_SIDES = {
    "shape": ("float32 (3, 4)", "float32 (4, 3)"),
    "dtype": ("float32 (4, 4)", "bfloat16 (4, 4)"),
    "kind": ("forward all_reduce of up", "forward all_gather of up"),
    "direction": ("forward all_reduce", "backward all_reduce"),
    "dim": ("along dim 0", "along dim 1"),
    "who": ("all_reduce of up", "all_reduce of down"),
}


@TOGETHER
@pytest.mark.parametrize("what", BOTH_SIDES)
def test_ranks_that_disagree_all_raise_and_name_both_sides(
    pool: Pool, degree: int, engine: str, what: str
) -> None:
    messages = pool(degree, engine).run(functools.partial(disagreement, what=what))
    others = "rank 1" if degree == 2 else "ranks 1"
    for message in messages:
        first, second = message.split(f"; {others}")
        assert "rank 0: " in first
        assert BOTH_SIDES[what][0] in first
        assert BOTH_SIDES[what][1] in second


def agreement(axis: Axis) -> list[str]:
    axis.agree({"plan": 1}, what="plans")
    rank = min(axis.rank, 1)
    same = {f"entry {number}": "long" * 100 for number in range(100)}
    messages = []
    for value in (
        {**same, "leaves": rank, "seed": 7},
        {**same, "leaves": rank, "seed": rank, **({"more": 3} if rank else {})},
        {**({"less": 4} if not rank else {}), **same, "seed": rank},
    ):
        with pytest.raises(MismatchError) as caught:
            axis.agree(value, what="plans", way_out="Seed alike.")
        messages.append(str(caught.value))
    return messages


@TOGETHER
def test_agree_raises_on_all_ranks_and_shows_the_first_that_differs(
    pool: Pool, degree: int, engine: str
) -> None:
    head = "the ranks of axis 'tp' were given different plans: for "
    for messages in pool(degree, engine).run(agreement):
        assert messages == [
            head + "leaves, rank 0 has 0, rank 1 has 1. Seed alike.",
            head + "leaves, rank 0 has 0, rank 1 has 1; 2 more differ. Seed alike.",
            head + "less, rank 0 has 4, rank 1 has nothing; 1 more differs. Seed alike.",
        ]


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (
            lambda axis: comm.all_gather(
                whole(5, 4), axis, dim=0, cut=Cut(8, 8, 1), direction="forward", who="up"
            ),
            r"up on rank 0 of 1 on axis 'tp': dim 0 of shape \(5, 4\) has 5 units, but 8 is what",
        ),
        (
            lambda axis: comm.reduce_scatter(
                whole(9, 4), axis, dim=0, cut=Cut(8, 8, 1), direction="forward"
            ),
            "reduce_scatter on .* has 9 units, but 8 is the whole",
        ),
        (
            lambda axis: comm.all_gather(
                whole(4), axis, dim=1, cut=Cut(4, 8, 1), direction="forward"
            ),
            r"dim 1 wanted of a tensor of shape \(4,\), which has 1 dims",
        ),
        (
            lambda axis: comm.all_gather(
                whole(4), axis, dim=0, cut=Cut(4, 8, 2), direction="forward"
            ),
            "the cut is for degree 2 and the axis has 1 ranks",
        ),
        (
            lambda axis: comm.all_reduce_nodes(
                {}, axis, cut=Cut(4, 8, 3), shape=(4,), like=whole(4), direction="forward"
            ),
            "the cut is for degree 3 and the axis has 1 ranks",
        ),
    ],
)
def test_a_tensor_that_the_cut_does_not_describe_raises(
    act: Callable[[Axis], object], text: str
) -> None:
    with pytest.raises(ShapeError, match=text):
        act(Axis.solo())


def check_gather_of_sizes(axis: Axis) -> None:
    sizes = tuple((3 * rank + 2) % 5 for rank in range(axis.size))
    start = sum(sizes[: axis.rank])
    for dim, shape in ((0, (sum(sizes), 5)), (1, (2, sum(sizes), 3)), (2, (2, 3, sum(sizes)))):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            full = (whole(*shape) * 9).to(dtype)
            x = full.narrow(dim, start, sizes[axis.rank])
            y = all_gather_sizes(x, axis, dim=dim, sizes=sizes, direction="forward")
            assert torch.equal(y, full), (dim, dtype)
            y.fill_(7)
            assert not full.numel() or bool((full != 7).any()), "the input was written"
    with pytest.raises(ShapeError, match=f"has {sizes[axis.rank] + 1} indices"):
        all_gather_sizes(
            full.new_empty(sizes[axis.rank] + 1), axis, dim=0, sizes=sizes, direction="forward"
        )


@EVERYWHERE
def test_parts_of_given_sizes_are_joined_in_rank_order(
    pool: Pool, degree: int, engine: str
) -> None:
    pool(degree, engine).run(check_gather_of_sizes)
