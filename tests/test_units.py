"""Units, who has them, and how the indices of a dim belong to them."""

import numpy as np
import pytest

from shardproof.errors import ShapeError
from shardproof.heads import Heads
from shardproof.leaves import Cut
from shardproof.units import Block, CutDim, Shared, Units, blocks_of, slices_of


def attention(queries: int, keys: int, degree: int) -> Shared:
    group = queries // keys
    needers = tuple(tuple(range(key * group, (key + 1) * group)) for key in range(keys))
    return Shared(Units("attention", queries, needers), 8, degree)


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("queries", "keys"), [(6, 2), (6, 1), (8, 8), (4, 2)])
def test_shared_units_are_the_key_value_heads(degree: int, queries: int, keys: int) -> None:
    heads = Heads(queries, keys, 4, 8, degree)
    shared = attention(queries, keys, degree)
    fused = CutDim(
        shared, (Block(queries * 4, 0, 4), Block(keys * 4, queries, 4), Block(keys * 4, queries, 4))
    )
    for rank in range(degree):
        assert shared.owned(rank) == heads.owned(rank)
        assert {number - queries for number in shared.holds(rank) if number >= queries} == set(
            heads.held(rank)
        )
        assert len(fused.held(rank)) == 4 * len(heads.owned(rank)) + 8 * len(heads.held(rank))
        keys_of_leaves = [
            sum(each.stop - each.start for each in slices) - 4 * len(shared.cut.leaf(leaf))
            for leaf, slices in zip(shared.cut.run(rank), fused.leaf_slices(rank), strict=True)
        ]
        assert keys_of_leaves == [2 * (each.stop - each.start) for each in heads.key_slices(rank)]
    every = np.sort(np.concatenate([fused.owned(rank) for rank in range(degree)]))
    assert np.array_equal(every, np.arange(fused.size))
    held = sum(len(fused.held(rank)) for rank in range(degree))
    assert (held == fused.size) == (not heads.shared())


def test_a_rank_begins_only_where_it_may() -> None:
    shared = Shared(Units("heads", 6, breaks=(0, 3)), 8, 3)
    assert [list(shared.owned(rank)) for rank in range(3)] == [[0, 1, 2], [], [3, 4, 5]]
    assert shared.cut.num_leaves == Cut(6, 8, 1).num_leaves
    assert not shared.is_whole
    assert Shared(Units("heads", 6, breaks=(0,)), 8, 2).is_whole


def test_blocks_say_what_labels_say() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 4, 0, 1, 0, 1, 5, 5, 5])
    blocks = blocks_of(labels)
    shared = Shared(Units("mixed", 6), 8, 2)
    assert np.array_equal(CutDim(shared, blocks).labels, labels)
    assert CutDim.of_labels(shared, labels) == CutDim(shared, blocks)
    assert blocks_of([]) == ()


def test_runs_of_indices() -> None:
    assert slices_of(np.array([3])) == (slice(3, 4),)
    assert slices_of(np.array([], dtype=np.int64)) == ()


def test_what_cannot_be() -> None:
    with pytest.raises(ShapeError, match="'none' has 0 units"):
        Units("none", 0)
    with pytest.raises(ShapeError, match="needed by"):
        Units("wrong", 2, ((1, 2),))
    with pytest.raises(ShapeError, match="whole units"):
        Block(5, 0, 2)
