"""Shared units that serve others: gradients of key-value heads, the same at every degree."""

from dataclasses import dataclass

import pytest
import torch

from cut_dims import Results, agrees, gradients, leaf, same_at_every_degree, whole_of
from invariance import bits_equal, normal
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.heads import Heads
from shardproof.ops.head_split import HeadSplit
from shardproof.ops.shared_units import Recipe, serve
from shardproof.ops.unit_moves import held_part
from shardproof.ops.unit_split import UnitSplit
from shardproof.scheme import Numerics, Scheme
from shardproof.units import Block, CutDim, Shared, Units


@dataclass(frozen=True)
class Group:
    """Query heads that share key-value heads, each head some indices."""

    queries: int
    keys: int
    width: int = 1
    blocks: int = 1  # of key-value heads, side by side

    def places(self, axis: Axis, numerics: Numerics = "invariant") -> tuple[UnitSplit, UnitSplit]:
        group = self.queries // self.keys
        needers = tuple(tuple(range(key * group, (key + 1) * group)) for key in range(self.keys))
        shared = Shared(Units("heads", self.queries, needers), 8, axis.size)
        source = (Block(self.keys * self.width, self.queries, self.width),) * self.blocks
        target = (Block(self.queries * self.width, 0, self.width),) * self.blocks
        scheme = Scheme(numerics=numerics)
        return (
            UnitSplit.of(axis, CutDim(shared, source), scheme, "keys"),
            UnitSplit.of(axis, CutDim(shared, target), scheme, "queries"),
        )

    @property
    def sources(self) -> tuple[int, ...]:
        """For every target index its source: index by index of the head, block by block."""
        group, found = self.queries // self.keys, []
        for block in range(self.blocks):
            for query in range(self.queries):
                for index in range(self.width):
                    key = query // group + block * self.keys
                    found.append(key * self.width + index)
        return tuple(found)


GROUPS = [
    Group(6, 2), Group(6, 2, 4), Group(6, 1, 2, 2), Group(8, 8), Group(12, 4, 1, 2), Group(3, 1, 3)
]  # fmt: skip


def served(
    axis: Axis, group: Group, dtype: torch.dtype, numerics: Numerics = "invariant"
) -> Results:
    source, target = group.places(axis, numerics)
    full = normal(2, source.size, 5, seed=1).to(dtype)
    x, sources = leaf(held_part(full, 1, source)), group.sources
    y = serve(x, -2, source, target, sources)
    grad_y = held_part(normal(2, target.size, 5, seed=2).to(dtype), 1, target)
    (grad,) = gradients(y, grad_y, x)
    assert serve(x, 1, source, target, sources).shape == y.shape  # by the recipe that was kept
    assert any(isinstance(kept[0], Recipe) for kept in source.recipes.values())
    return {"y": whole_of(y, 1, target), "grad": whole_of(grad, 1, source)}


def plain(group: Group, dtype: torch.dtype) -> Results:
    index = torch.tensor(group.sources)
    x = leaf(normal(2, group.keys * group.width * group.blocks, 5, seed=1).to(dtype).double())
    y = x.index_select(1, index)
    (grad,) = gradients(y, normal(2, *y.shape[1:], seed=2).to(dtype).double(), x)
    return {"y": y.detach(), "grad": grad}


@pytest.mark.parametrize(
    ("group", "dtype"),
    [
        *[(group, torch.float32) for group in GROUPS],
        *[(GROUPS[2], dtype) for dtype in (torch.float64, torch.bfloat16)],
    ],
    ids=str,
)
def test_what_serves_gets_the_same_gradient_at_every_degree(
    pool: Pool, group: Group, dtype: torch.dtype
) -> None:
    found = same_at_every_degree(pool, lambda axis: served(axis, group, dtype))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    agrees({name: x.double() for name, x in found.items()}, plain(group, dtype), tolerance)


def test_native_gradients_are_right(pool: Pool) -> None:
    for degree in (1, 3):
        for group in GROUPS:
            for found in pool(degree, "threads").run(
                lambda axis, it=group: served(axis, it, torch.float64, "native")
            ):
                agrees(found, plain(group, torch.float64))


def test_the_bits_are_those_of_the_attention(pool: Pool) -> None:
    def both(axis: Axis) -> None:
        source, target = Group(12, 4).places(axis)
        split = HeadSplit(axis, Heads(12, 4, 5, 8, axis.size), Scheme())
        grad_y = held_part(normal(2, 12, 5, seed=2), 1, target)
        x = leaf(held_part(normal(2, 4, 5), 1, source))
        (grad,) = gradients(serve(x, 1, source, target, Group(12, 4).sources), grad_y, x)
        theirs = split.key_gradients(grad_y.unsqueeze(0).unsqueeze(3))
        assert bits_equal(grad, theirs[0].squeeze(2))

    for degree in (1, 5):
        pool(degree, "threads").run(both)


def test_one_gather_and_only_where_ranks_share(pool: Pool) -> None:
    def calls(axis: Axis) -> tuple[int, int]:
        found = []
        for group in (Group(6, 2, 4), Group(8, 8)):
            axis.transport.ledger.reset()
            served(axis, group, torch.float32)
            table = axis.transport.ledger.as_dict().get("backward", {})
            found.append(table.get("all_gather", {}).get("calls", 0))
        return found[0], found[1]

    assert pool(1, "threads").run(calls) == [(0, 0)]
    assert pool(3, "threads").run(calls) == [(1, 0)] * 3


def test_what_is_not_held_cannot_serve(pool: Pool) -> None:
    def refused(axis: Axis) -> None:
        source, target = Group(6, 2).places(axis)
        with pytest.raises(ShapeError, match=r"source_index has shape \(5,\)"):
            serve(held_part(normal(2, 2), 1, source), 1, source, target, (0,) * 5)
        other, _ = Group(6, 1).places(axis)
        with pytest.raises(ShapeError, match="cut by different units"):
            serve(held_part(normal(2, 1), 1, other), 1, other, target, (0,) * 6)
        if axis.rank == 1:
            with pytest.raises(ShapeError, match="does not hold"):
                serve(held_part(normal(2, 2), 1, source), 1, source, target, (0,) * 6)

    pool(2, "threads").run(refused)


def test_order_of_the_degree_would_be_seen(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: each rank adds up what it has."""

    def added(recipe: Recipe, kind: object, rank: int) -> list[tuple[int, int]]:
        run = kind.runs[rank]  # type: ignore[attr-defined]
        return [(run.start, run.stop)] if run else []

    monkeypatch.setattr(Recipe, "nodes", added)
    monkeypatch.setattr(
        Recipe,
        "_sum",
        lambda recipe, node, values, like, length: sum(
            values[part] for part in sorted(values) if node[0] <= part[0] < node[1]
        ),
    )
    with pytest.raises(AssertionError, match="grad differs at degree"):
        same_at_every_degree(pool, lambda axis: served(axis, Group(6, 1, 2, 2), torch.float32))
