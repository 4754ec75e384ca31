"""A matrix cut along one dim becomes one cut along the other; only bytes move."""

import pytest
import torch
from torch import Tensor

from invariance import LargestNew, bits_equal, normal, strided
from places import EVERYWHERE, Pool
from shardproof import recut
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.heads import Heads
from shardproof.leaves import Cut
from shardproof.transport.base import Call

WHOLE = normal(11, 43)


def there_and_back(axis: Axis, is_strided: bool) -> tuple[bool, bool, bool]:
    rows, columns = Cut(11, 8, axis.size), Cut(43, 8, axis.size)
    own, mine = rows.owned(axis.rank), columns.owned(axis.rank)
    x = WHOLE[own.start : own.stop]
    x = strided(x) if is_strided else x
    before = x.clone()
    y = recut.to_columns(x, axis, rows=rows, columns=columns, direction="update")
    is_turned = bits_equal(y, WHOLE[:, mine.start : mine.stop].clone())
    held = [rows.run(rank) for rank in range(axis.size)]
    turned = strided(y) if is_strided else y
    z = recut.to_rows(turned, axis, rows=rows, columns=columns, held=held, direction="update")
    y.zero_()  # nothing that others still read
    axis.transport.gather_objects(None, call=Call("wait", "setup", "test"))
    return is_turned, bits_equal(z, before), bits_equal(x, before)


@EVERYWHERE
def test_a_matrix_is_turned_there_and_back(pool: Pool, degree: int, engine: str) -> None:
    for is_strided in (False, True):
        for found in pool(degree, engine).run(lambda axis, s=is_strided: there_and_back(axis, s)):
            assert found == (True, True, True)


def test_fewer_rows_and_columns_than_ranks(pool: Pool) -> None:
    """Idle ranks send and get nothing, and take part."""

    def run(axis: Axis) -> Tensor:
        rows, columns = Cut(3, 8, axis.size), Cut(2, 8, axis.size)
        whole = normal(3, 2)
        own = rows.owned(axis.rank)
        part = whole[own.start : own.stop]
        return recut.to_columns(part, axis, rows=rows, columns=columns, direction="update")

    found = pool(8, "threads").run(run)
    assert [tuple(part.shape) for part in found] == [(3, 1)] * 2 + [(3, 0)] * 6
    assert torch.equal(torch.cat(found, dim=1), normal(3, 2))


def test_rows_that_several_ranks_hold_come_to_each(pool: Pool) -> None:
    """Key-value heads: two for eight ranks, of six rows each."""

    def run(axis: Axis) -> bool:
        heads = Heads(8, 2, 6, 8, axis.size)
        rows, columns = heads.key_cut, Cut(43, 8, axis.size)
        whole, mine = normal(12, 43), columns.owned(axis.rank)
        held = [heads.held(rank) for rank in range(axis.size)]
        y = recut.to_rows(
            whole[:, mine.start : mine.stop],
            axis,
            rows=rows,
            columns=columns,
            held=held,
            direction="update",
        )
        units = rows.units(held[axis.rank])
        return bits_equal(y, whole[units.start : units.stop].clone())

    for degree in (1, 3, 8):
        assert all(pool(degree, "threads").run(run))


def test_no_buffer_is_larger_than_a_share(pool: Pool) -> None:
    def run(axis: Axis) -> bool:
        rows, columns = Cut(40, 8, axis.size), Cut(80, 8, axis.size)
        part = normal(len(rows.owned(axis.rank)), 80)
        with LargestNew(part) as watch:
            recut.to_columns(part, axis, rows=rows, columns=columns, direction="update")
        return 0 < watch.bytes <= 40 * 80 * 4 // axis.size

    assert all(pool(8, "threads").run(run))


def test_a_tensor_that_is_not_the_share_is_refused() -> None:
    axis, cut = Axis.solo(), Cut(4, 8, 1)
    with pytest.raises(ShapeError, match=r"got shape \(4, 3\), but this rank owns \(4, 4\)"):
        recut.to_columns(torch.ones(4, 3), axis, rows=cut, columns=cut, direction="update")
    with pytest.raises(ShapeError, match="the cut is for degree 2 and the axis has 1"):
        recut.to_rows(
            torch.ones(4, 4),
            axis,
            rows=Cut(4, 8, 2),
            columns=cut,
            held=[range(4)],
            direction="update",
        )
