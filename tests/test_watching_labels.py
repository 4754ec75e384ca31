"""Labels: sets of them, how they move with views, where a rank may begin."""

import numpy as np
import pytest
import torch
from torch import nn

from shardproof.watching import choose, families, watch
from shardproof.watching.atoms import Atoms, distinct
from shardproof.watching.boundaries import Box, Numbering, boundaries
from shardproof.watching.factors import combine, compress, reduce_lines, settle
from shardproof.watching.moving import regroup
from shardproof.watching.record import Record


def labels(*values: object) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_joined_labels_have_the_smallest_as_their_root() -> None:
    atoms = Atoms()
    made = atoms.fresh(6)
    assert made.tolist() == [1, 2, 3, 4, 5, 6]
    atoms.join(labels(6, 5, 2), labels(5, 3, 1))
    assert atoms.roots(made).tolist() == [1, 1, 3, 4, 3, 3]
    atoms.join(labels(6), labels(2))
    assert atoms.roots(made).tolist() == [1, 1, 1, 4, 1, 1]
    assert atoms.sizes(labels(1, 4)).tolist() == [5, 1]


def test_joining_is_what_a_plain_search_finds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        atoms, count = Atoms(), 40
        atoms.fresh(count)
        left, right = generator.integers(1, count + 1, (2, 25))
        sets = [{number} for number in range(count + 1)]
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            both = sets[a] | sets[b]
            for each in both:
                sets[each] = both
        atoms.join(left, right)
        found = atoms.roots(np.arange(1, count + 1)).tolist()
        assert found == [min(sets[number]) for number in range(1, count + 1)]
        assert atoms.sizes(labels(*found)).tolist() == [
            len(sets[number]) for number in range(1, count + 1)
        ]


def test_distinct_is_sorted_and_once() -> None:
    assert distinct(labels(3, 1, 3, 2, 1)).tolist() == [1, 2, 3]
    assert distinct(labels()).tolist() == []


@pytest.mark.parametrize(
    ("old", "new", "shape"),
    [
        ((2, 5, 12), (10, 12), (1, 12)),
        ((2, 5, 12), (2, 5, 3, 4), (1, 1, 3, 4)),
        ((2, 5, 12), (2, 60), (1, 60)),
        ((2, 5, 12), (2, 1, 5, 12), (1, 1, 1, 12)),
        ((2, 5, 12), (120,), (120,)),
    ],
)
def test_a_view_expands_only_what_it_must(
    old: tuple[int, ...], new: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    factor = np.arange(1, 13).reshape(1, 1, 12)
    made = regroup(factor, old, new)
    assert made.shape == shape
    whole = np.broadcast_to(factor, old).reshape(new)
    assert np.array_equal(np.broadcast_to(made, new), whole)


def test_lines_that_are_used_whole_are_units() -> None:
    record = Record()
    factor = record.atoms.fresh(6).reshape(1, 2, 3)
    made = reduce_lines(factor, (-1,), record)
    assert made.tolist() == [[[1], [4]]]
    assert record.atoms.roots(labels(1, 2, 3, 4, 5, 6)).tolist() == [1, 1, 1, 4, 4, 4]


def test_what_several_lines_have_is_needed_by_each() -> None:
    record = Record()
    record.atoms.fresh(5)
    made = reduce_lines(labels([1, 2, 5], [3, 4, 5]), (1,), record)
    assert made.tolist() == [[1], [3]]
    assert np.concatenate(record.needs).tolist() == [[1, 5], [3, 5]]


def test_many_labels_that_meet_one_need_it() -> None:
    record = Record()
    record.atoms.fresh(6)
    made = combine([(labels(1, 2, 3, 4), False), (labels(5, 5, 6, 6), False)], "add", record)
    assert [each.tolist() for each in made] == [[1, 2, 3, 4]]
    assert np.concatenate(record.needs).tolist() == [[1, 5], [2, 5], [3, 6], [4, 6]]


def test_fresh_labels_of_a_parameter_are_joined() -> None:
    record = Record()
    record.atoms.fresh(6)
    combine([(labels(1, 2, 3, 4), True), (labels(5, 5, 6, 6), False)], "add", record)
    assert record.needs == []
    assert record.atoms.roots(labels(1, 2, 3, 4, 5, 6)).tolist() == [1, 1, 3, 3, 1, 3]


def test_two_kinds_in_one_dim_are_cut_as_the_one_that_more_is_joined_with() -> None:
    record = Record()
    record.atoms.fresh(20)
    record.atoms.join(labels(1, 1, 2, 2), labels(10, 11, 12, 13))
    heads, features = labels(1, 2, 1, 2, 1, 2), labels(3, 3, 4, 4, 5, 5)
    (kept,) = settle([features, heads], record)
    assert kept.tolist() == heads.tolist()
    assert np.concatenate(record.needs).tolist() == [[1, 3], [2, 3]]


def test_what_does_not_vary_has_size_one() -> None:
    record = Record()
    record.atoms.fresh(4)
    factor = np.broadcast_to(labels(1, 2).reshape(1, 2, 1), (3, 2, 5))
    assert compress(factor, record).shape == (1, 2, 1)
    assert compress(np.zeros((2, 2), dtype=np.int64), record) is None


def numbering(count: int, pairs: object = ()) -> Numbering:
    units = np.arange(1, count + 1)
    needs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Numbering.of(units, np.arange(count), np.zeros(count, dtype=np.uint64), needs)


def test_a_rank_begins_where_its_elements_are_a_run_along_one_dim() -> None:
    six = numbering(6)
    assert boundaries(six, []) is None
    assert boundaries(six, [Box(labels([1, 2, 3], [4, 5, 6]), True)]) == (0, 3)
    assert boundaries(six, [Box(labels([1, 1], [2, 2], [3, 4], [5, 6]), True)]) == (0, 1, 2, 4)
    assert boundaries(six, [Box(labels([1, 3, 5], [2, 4, 6]), True)]) == (0, 2, 4)
    both = [Box(labels([1, 2, 3], [4, 5, 6]), True), Box(labels([1, 2], [3, 4], [5, 6]), True)]
    assert boundaries(six, both) == (0,)


def test_what_all_ranks_hold_is_in_the_way_only_where_it_was_in_one_dim() -> None:
    three = numbering(3, [(1, 9), (2, 9), (3, 9)])
    layout = labels([1, 9], [2, 9], [3, 9])
    assert boundaries(three, [Box(layout, False)]) is None
    assert boundaries(three, [Box(layout, True)]) == (0,)


def test_labels_stay_small_where_activations_are_large() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.fc1, self.fc2 = (
                nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 32), nn.Linear(32, 8),
            )  # fmt: skip

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.patch(image).flatten(2).transpose(1, 2).contiguous()
            return self.fc2(self.fc1(x).relu().view(-1, 32))

    watched = watch(Tower(), (torch.rand(64, 3, 512, 512, device="meta"),))
    assert watched.device == "meta"
    largest = max([each.size for each in watched.record.boxes.values()], default=0)
    assert largest <= 64
    found = choose(families(watched), watched).families
    assert [family.units.count for family in found if family.kind == "pair"] == [32]


def test_a_view_that_splits_one_dim_is_kept_as_such() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x).view(2, 2, 3).transpose(1, 2).relu()

    boxes = watch(Split(), (torch.rand(2, 4),)).record.boxes
    assert {key[:2] for key in boxes} >= {((2, 3), True), ((3, 2), False)}
