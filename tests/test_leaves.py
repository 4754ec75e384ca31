"""Who owns what, with the answers written out: parity with plain torch cannot see a relabelling."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardproof.errors import DegreeError, ShapeError
from shardproof.leaves import DEFAULT_LEAVES, Cut, Layout, check_degree, replicated, share

# (units, leaves asked for): units of each leaf.
LEAF_SIZES = {
    (64, 8): (8, 8, 8, 8, 8, 8, 8, 8),
    (63, 8): (8, 8, 8, 8, 8, 8, 8, 7),
    (7, 8): (1, 1, 1, 1, 1, 1, 1),
    (5, 8): (1, 1, 1, 1, 1),
    (1, 8): (1,),
    (64, 5): (13, 13, 13, 13, 12),
    (63, 5): (13, 13, 13, 12, 12),
    (7, 5): (2, 2, 1, 1, 1),
    (5, 5): (1, 1, 1, 1, 1),
    (1, 5): (1,),
    (64, 1): (64,),
    (63, 1): (63,),
    (7, 1): (7,),
    (5, 1): (5,),
    (1, 1): (1,),
}

# (units, leaves asked for): units of each rank, at degrees 1, 2, 3, ...
RANK_SIZES = {
    (64, 8): (
        (64,),
        (32, 32),
        (24, 24, 16),
        (16, 16, 16, 16),
        (16, 16, 16, 8, 8),
        (16, 16, 8, 8, 8, 8),
        (16, 8, 8, 8, 8, 8, 8),
        (8, 8, 8, 8, 8, 8, 8, 8),
    ),
    (63, 8): (
        (63,),
        (32, 31),
        (24, 24, 15),
        (16, 16, 16, 15),
        (16, 16, 16, 8, 7),
        (16, 16, 8, 8, 8, 7),
        (16, 8, 8, 8, 8, 8, 7),
        (8, 8, 8, 8, 8, 8, 8, 7),
    ),
    (7, 8): (
        (7,),
        (4, 3),
        (3, 2, 2),
        (2, 2, 2, 1),
        (2, 2, 1, 1, 1),
        (2, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 1, 0),
    ),
    (5, 8): (
        (5,),
        (3, 2),
        (2, 2, 1),
        (2, 1, 1, 1),
        (1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 0),
        (1, 1, 1, 1, 1, 0, 0),
        (1, 1, 1, 1, 1, 0, 0, 0),
    ),
    (1, 8): (
        (1,),
        (1, 0),
        (1, 0, 0),
        (1, 0, 0, 0),
        (1, 0, 0, 0, 0),
        (1, 0, 0, 0, 0, 0),
        (1, 0, 0, 0, 0, 0, 0),
        (1, 0, 0, 0, 0, 0, 0, 0),
    ),
    (64, 5): ((64,), (39, 25), (26, 26, 12), (26, 13, 13, 12), (13, 13, 13, 13, 12)),
    (63, 5): ((63,), (39, 24), (26, 25, 12), (26, 13, 12, 12), (13, 13, 13, 12, 12)),
    (7, 5): ((7,), (5, 2), (4, 2, 1), (4, 1, 1, 1), (2, 2, 1, 1, 1)),
    (5, 5): ((5,), (3, 2), (2, 2, 1), (2, 1, 1, 1), (1, 1, 1, 1, 1)),
    (1, 5): ((1,), (1, 0), (1, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0, 0)),
    (64, 1): ((64,),),
    (63, 1): ((63,),),
    (7, 1): ((7,),),
    (5, 1): ((5,),),
    (1, 1): ((1,),),
}

DEGREES = [
    (size, leaves, degree)
    for (size, leaves), rows in RANK_SIZES.items()
    for degree in range(1, len(rows) + 1)
]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    leaves = draw(st.integers(1, 24))
    return Cut(draw(st.integers(1, 300)), leaves, draw(st.integers(1, leaves)))


# -- answers written out ---------------------------------------------------------------------------


def test_default_is_eight_leaves() -> None:
    assert DEFAULT_LEAVES == 8


def test_share_gives_longer_runs_first_and_empty_runs_last() -> None:
    assert share(8, 3) == (range(3), range(3, 6), range(6, 8))
    assert share(10, 4) == (range(3), range(3, 6), range(6, 8), range(8, 10))
    assert share(2, 4) == (range(1), range(1, 2), range(2, 2), range(2, 2))
    assert share(0, 2) == (range(0), range(0))


@pytest.mark.parametrize(("size", "leaves"), LEAF_SIZES)
def test_leaf_sizes(size: int, leaves: int) -> None:
    cut = Cut(size, leaves, degree=1)
    expected = LEAF_SIZES[size, leaves]
    assert cut.num_leaves == len(expected)
    assert tuple(len(cut.leaf(index)) for index in range(cut.num_leaves)) == expected


@pytest.mark.parametrize(("size", "leaves", "degree"), DEGREES)
def test_leaves_do_not_depend_on_the_degree(size: int, leaves: int, degree: int) -> None:
    alone, shared = Cut(size, leaves, 1), Cut(size, leaves, degree)
    assert shared.num_leaves == alone.num_leaves
    for index in range(alone.num_leaves):
        assert shared.leaf(index) == alone.leaf(index)


@pytest.mark.parametrize(("size", "leaves", "degree"), DEGREES)
def test_rank_sizes(size: int, leaves: int, degree: int) -> None:
    cut, expected = Cut(size, leaves, degree), RANK_SIZES[size, leaves][degree - 1]
    assert cut.sizes() == expected
    stop = 0
    for rank, units in enumerate(expected):
        start, stop = stop, stop + units
        if units:
            assert cut.owned(rank) == range(start, stop)
        else:
            assert len(cut.owned(rank)) == 0
    assert cut.idle_ranks() == tuple(rank for rank, units in enumerate(expected) if units == 0)


def test_runs_and_units_of_the_drawing() -> None:
    two, three = Cut(64, 8, 2), Cut(64, 8, 3)
    assert [two.run(rank) for rank in range(2)] == [range(4), range(4, 8)]
    assert [three.run(rank) for rank in range(3)] == [range(3), range(3, 6), range(6, 8)]
    assert three.units(range(3, 6)) == range(24, 48)
    assert [three.owned(rank) for rank in range(3)] == [range(24), range(24, 48), range(48, 64)]


def test_units_of_uneven_leaves() -> None:
    cut = Cut(63, 8, 3)
    assert [cut.owned(rank) for rank in range(3)] == [range(24), range(24, 48), range(48, 63)]
    assert cut.units(range(8)) == range(63)
    assert cut.units(range(7, 8)) == range(56, 63)
    assert len(cut.units(range(0))) == 0


def test_leaf_slices_are_local() -> None:
    cut = Cut(63, 8, 3)
    assert cut.leaf_slices(0) == (slice(0, 8), slice(8, 16), slice(16, 24))
    assert cut.leaf_slices(1) == (slice(0, 8), slice(8, 16), slice(16, 24))
    assert cut.leaf_slices(2) == (slice(0, 8), slice(8, 15))


def test_a_rank_without_leaves_owns_nothing() -> None:
    cut = Cut(5, 8, 7)
    assert cut.idle_ranks() == (5, 6)
    for rank in cut.idle_ranks():
        assert not cut.run(rank)
        assert not cut.owned(rank)
        assert cut.leaf_slices(rank) == ()


# -- errors ----------------------------------------------------------------------------------------


def test_degree_above_the_leaves_names_the_value_that_would_do() -> None:
    with pytest.raises(DegreeError, match=r"degree 9 exceeds leaves=8: .*Use leaves=9 or more"):
        Cut(64, 8, 9)
    with pytest.raises(DegreeError, match=r"or a degree of at most 5\."):
        check_degree(6, 5)


def test_degree_is_judged_by_the_plan_and_not_by_a_small_dim() -> None:
    check_degree(8, 8)
    assert Cut(1, 8, 8).idle_ranks() == (1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("degree", [0, -2])
def test_degree_below_one(degree: int) -> None:
    with pytest.raises(DegreeError, match=f"degree {degree} is not a positive number"):
        check_degree(degree, 8)


@pytest.mark.parametrize("leaves", [0, -3])
def test_leaves_below_one(leaves: int) -> None:
    with pytest.raises(DegreeError, match=rf"leaves={leaves} is not a positive number.*default 8"):
        Cut(64, leaves, 1)


@pytest.mark.parametrize("size", [0, -1])
def test_a_dim_needs_a_unit(size: int) -> None:
    with pytest.raises(ShapeError, match=f"cannot cut a dim of {size} units: it needs at least"):
        Cut(size, 8, 2)


@pytest.mark.parametrize(("size", "parts"), [(4, 0), (-1, 2), (4, -1)])
def test_share_of_nonsense(size: int, parts: int) -> None:
    with pytest.raises(ShapeError, match=f"cannot share {size} items among {parts} parts"):
        share(size, parts)


# -- properties ------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(1, 40))
def test_shares_differ_by_at_most_one(size: int, parts: int) -> None:
    lengths = [len(run) for run in share(size, parts)]
    assert sum(lengths) == size
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@given(cuts())
def test_leaves_partition_the_units(cut: Cut) -> None:
    leaves = [cut.leaf(index) for index in range(cut.num_leaves)]
    assert [unit for leaf in leaves for unit in leaf] == list(range(cut.size))
    assert all(leaves), "no leaf is empty"
    assert max(map(len, leaves)) - min(map(len, leaves)) <= 1


@given(cuts())
def test_runs_partition_the_leaves(cut: Cut) -> None:
    runs = [cut.run(rank) for rank in range(cut.degree)]
    assert [leaf for run in runs for leaf in run] == list(range(cut.num_leaves))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


@given(cuts())
def test_a_rank_owns_whole_leaves(cut: Cut) -> None:
    for rank in range(cut.degree):
        of_leaves = [unit for index in cut.run(rank) for unit in cut.leaf(index)]
        assert list(cut.owned(rank)) == of_leaves


@given(cuts())
def test_leaf_slices_tile_the_shard(cut: Cut) -> None:
    for rank in range(cut.degree):
        shard = list(cut.owned(rank))
        pieces = [shard[piece] for piece in cut.leaf_slices(rank)]
        assert pieces == [list(cut.leaf(index)) for index in cut.run(rank)]
        assert [unit for piece in pieces for unit in piece] == shard


def loses_no_unit(owned: Callable[[Cut, int], range], cut: Cut) -> None:
    units = [unit for rank in range(cut.degree) for unit in owned(cut, rank)]
    assert units == list(range(cut.size))


@given(cuts())
def test_no_unit_is_lost_or_owned_twice(cut: Cut) -> None:
    loses_no_unit(Cut.owned, cut)


def test_negative_control_truncating_division_loses_units() -> None:
    def truncated(cut: Cut, rank: int) -> range:
        length = cut.size // cut.degree
        return range(rank * length, (rank + 1) * length)

    with pytest.raises(AssertionError):
        given(cuts())(lambda cut: loses_no_unit(truncated, cut))()


def test_negative_control_leaves_from_the_degree() -> None:
    # The tempting shortcut, as many leaves as ranks, moves the borders with the degree.
    borders = {degree: [Cut(63, degree, degree).leaf(0).stop] for degree in (2, 3, 4)}
    assert len({tuple(border) for border in borders.values()}) == 3


# -- layouts ---------------------------------------------------------------------------------------


def test_layout_of_a_cut_tensor() -> None:
    layout = Layout((10, 63), rank=2, dim=1, cut=Cut(63, 8, 3))
    assert not layout.is_replicated
    assert layout.owned == range(48, 63)
    assert layout.held == range(6, 8)
    assert layout.local_shape == (10, 15)
    assert layout.of(0).local_shape == (10, 24)
    assert layout.of(0).owned == range(24)


def test_layout_of_an_idle_rank_is_an_empty_shard() -> None:
    layout = Layout((5, 3), rank=6, dim=0, cut=Cut(5, 8, 7))
    assert layout.local_shape == (0, 3)
    assert len(layout.owned) == 0


def test_layout_may_hold_more_than_it_owns() -> None:
    layout = Layout((8, 3), rank=1, dim=0, cut=Cut(8, 4, 4), held=range(2))
    assert layout.local_shape == (4, 3)
    assert layout.owned == range(2, 4)


def test_replicated_layout_holds_everything() -> None:
    layout = replicated((4, 6), rank=3)
    assert layout.is_replicated
    assert layout.local_shape == (4, 6)
    assert layout.owned == range(4)
    assert replicated(()).local_shape == ()
    assert len(replicated(()).owned) == 0


def test_layout_state_tells_degrees_and_ranks_apart() -> None:
    states = [
        Layout((63, 2), rank, 0, Cut(63, leaves, degree)).state()
        for leaves, degree, rank in [(8, 2, 0), (8, 2, 1), (8, 3, 0), (16, 2, 0)]
    ]
    assert states[0] == {
        "shape": [63, 2],
        "dim": 0,
        "leaves": 8,
        "degree": 2,
        "rank": 0,
        "held": [0, 4],
    }
    assert all(a != b for place, a in enumerate(states) for b in states[:place])
    assert replicated((63, 2)).state() == {"shape": [63, 2], "dim": None}


def test_layout_wants_dim_and_cut_together() -> None:
    with pytest.raises(ShapeError, match=r"both dim and cut or neither, got Layout.*dim=1"):
        Layout((4, 6), rank=0, dim=1)
    with pytest.raises(ShapeError, match=r"both dim and cut or neither, got Layout.*size=6"):
        Layout((4, 6), rank=0, cut=Cut(6, 2, 2))


def test_layout_wants_the_cut_of_its_own_dim() -> None:
    with pytest.raises(ShapeError, match=r"dim 1 of shape \(4, 6\) has 6 units, its cut 4"):
        Layout((4, 6), rank=0, dim=1, cut=Cut(4, 2, 2))
