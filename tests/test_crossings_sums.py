"""Sums over cut dims, sums that broadcasting hides, and shared units that serve others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cut_dims import (
    DIMS,
    EACH_TYPED,
    Dim,
    Results,
    agrees,
    gradients,
    leaf,
    same_at_every_degree,
    whole_of,
)
from invariance import bits_equal, normal, random_threads
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.ops import unit_sums
from shardproof.ops.unit_linear import row
from shardproof.ops.unit_moves import held_part, take
from shardproof.ops.unit_split import Pieces, UnitSplit
from shardproof.ops.unit_sums import expand, fold, mean_cut, spread, sum_cut

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Shapes of what is spread over (2, 5, cut, 4): the dims before it are rows.
SPREADS = [(4,), (1,), (), (5, 1, 4), (2, 1, 1, 4), (2, 5, 1, 4), (1, 5, 1, 1)]


def drawn(shape: tuple[int, ...]) -> Tensor:
    return normal(*shape, 1, seed=1).view(shape)


def spread_step(axis: Axis, dim: Dim, dtype: torch.dtype) -> Results:
    place, found = dim.place(axis), {}
    full = normal(2, 5, dim.size, 4, seed=3).to(dtype)
    part = held_part(full, 2, place)
    for given in SPREADS:
        x = leaf(drawn(given).to(dtype))
        y = spread(x, part.shape, -2, place)
        assert torch.equal(y, x.expand(part.shape))
        with random_threads(axis.rank):
            (found[f"spread {given}"],) = gradients(y * 2, part.abs(), x)
    bias = leaf(normal(dim.size, 1, seed=5).to(dtype))
    y = expand(take(bias, 0, place), part.shape)
    (found["bias"],) = gradients(y, part, bias)
    x = leaf(part)
    total = sum_cut(x, 2, place, keepdim=True)
    mean = mean_cut(x, -2, place)
    folded = fold(x, (0, -1), keepdim=False)
    (grad,) = gradients(total.sum() + 2 * mean.sum() + folded.sum(), torch.ones((), dtype=dtype), x)
    found |= {"sum": total.detach(), "mean": mean.detach(), "grad_x": whole_of(grad, 2, place)}
    return found | {"folded": whole_of(folded, 1, place)}


def spread_plain(dim: Dim, dtype: torch.dtype) -> Results:
    full, found = normal(2, 5, dim.size, 4, seed=3).to(dtype).double(), {}
    for given in SPREADS:
        x = leaf(drawn(given).to(dtype).double())
        (found[f"spread {given}"],) = gradients(x * 2 * torch.ones_like(full), full.abs(), x)
    found["bias"] = full.sum((0, 1, 3)).view(-1, 1)
    found |= {"sum": full.sum(2, keepdim=True), "mean": full.mean(2)}
    found["grad_x"] = torch.full_like(full, 2 + 2 / dim.size)
    return found | {"folded": full.sum((0, 3))}


@EACH_TYPED
def test_sums_have_the_same_bits_and_torchs_numbers(
    pool: Pool, dim: Dim, dtype: torch.dtype
) -> None:
    found = same_at_every_degree(pool, lambda axis: spread_step(axis, dim, dtype))
    agrees(
        {name: value.double() for name, value in found.items()},
        spread_plain(dim, dtype),
        TOLERANCE[dtype],
    )


def test_native_sums_have_torchs_numbers(pool: Pool) -> None:
    def native(axis: Axis) -> Results:
        place = DIMS["fused"].place(axis, numerics="native")
        full = normal(3, place.size, seed=3).double()
        x = leaf(normal(3, 1).double())
        part = leaf(held_part(full, 1, place))
        (grad,) = gradients(spread(x, part.shape, 1, place), part.detach(), x)
        return {"sum": sum_cut(part, 1, place).detach(), "grad": grad}

    full = normal(3, 40, seed=3).double()
    for degree in (1, 3):
        for found in pool(degree, "threads").run(native):
            agrees(found, {"sum": full.sum(1), "grad": full.sum(1, keepdim=True)})


def test_whole_numbers_are_counted_once(pool: Pool) -> None:
    def counted(axis: Axis) -> None:
        place = DIMS["fused"].place(axis)
        full = normal(3, place.size) > 0
        found = sum_cut(held_part(full, 1, place), 1, place)
        assert torch.equal(found, full.sum(1))
        assert torch.equal(fold(full, 1), full.sum(1))

    for degree in (1, 3, 8):
        pool(degree, "threads").run(counted)


def test_a_tensor_of_the_whole_dim_is_not_spread(pool: Pool) -> None:
    def refused(axis: Axis) -> None:
        place = DIMS["fused"].place(axis)
        with pytest.raises(ShapeError, match=r"cannot be spread to \(2, 41\)"):
            spread(normal(41), (2, 41), 1, place)

    pool(2, "threads").run(refused)


def test_no_gradient_no_sum(pool: Pool) -> None:
    def counted(axis: Axis) -> None:
        place = DIMS["fused"].place(axis)
        x, ledger = leaf(normal(3, 1)), axis.transport.ledger
        ledger.reset()
        y = spread(x, (3, place.length), 1, place)
        assert ledger.as_dict() == {}
        y.sum().backward()
        assert ledger.as_dict()["backward"]["all_reduce"]["calls"] == 1
        total = sum_cut(leaf(y), 1, place)
        total.sum().backward()
        assert ledger.as_dict()["forward"]["all_reduce"]["calls"] == 1
        assert ledger.as_dict()["backward"]["all_reduce"]["calls"] == 1

    pool(2, "threads").run(counted)


def _leaves_of_what_is_held(place: UnitSplit) -> None:
    """Pieces that lie side by side in what is held made one: leaves from the degree."""
    slices = place.cut_dim.leaf_slices(place.axis.rank)
    rounds = max([1, *map(len, slices)])
    filled = [[*each, *[slice(0, 0)] * (rounds - len(each))] for each in slices]
    object.__setattr__(
        place, "pieces", Pieces(tuple(tuple(row[n] for row in filled) for n in range(rounds)))
    )


def _every_holder(place: UnitSplit) -> None:
    """What a rank holds and does not own is counted by it too, in its first leaf."""
    extra = sorted(set(range(place.length)) - set(place.owned.indices.tolist()))
    if not extra:
        return
    rounds = tuple(
        tuple(slice(at, at + 1) if leaf == 0 else slice(0, 0) for leaf in range(len(place.run)))
        for at in extra
    )
    object.__setattr__(place, "pieces", Pieces((*place.pieces.slices, *rounds)))


@pytest.mark.parametrize(
    ("plant", "name", "what"),
    [
        (_every_holder, "fused", "sum"),
        (_every_holder, "fused", "row"),
        (_leaves_of_what_is_held, "gate and up", "row"),
    ],
)
def test_planted_faults_are_seen(
    pool: Pool, plant: Callable[[UnitSplit], None], name: str, what: str
) -> None:
    def planted(axis: Axis) -> Results:
        place = DIMS[name].place(axis)
        plant(place)
        x = held_part(normal(33, place.size), 1, place)
        if what == "sum":
            return {"y": sum_cut(x, 1, place)}
        return {"y": row(x, held_part(normal(5, place.size), 1, place), None, place)}

    with pytest.raises(AssertionError, match="y differs at degree"):
        same_at_every_degree(pool, planted)


def test_even_leaves_at_once_have_the_bits_of_one_after_another(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sums(axis: Axis) -> Results:
        place = DIMS["even"].place(axis)
        assert bool(place.even_leaf) == (axis.size <= 8)
        return {"y": sum_cut(held_part(normal(33, place.size), 1, place), 1, place)}

    at_once = same_at_every_degree(pool, sums)
    monkeypatch.setattr(unit_sums, "_SMALL", 0)
    assert bits_equal(at_once["y"], same_at_every_degree(pool, sums)["y"])
