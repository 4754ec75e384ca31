"""Query heads and the key-value heads that they share: who owns, who holds, and what is summed."""

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from places import EVERYWHERE, Pool
from shardproof.errors import ShapeError
from shardproof.heads import Heads
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.leaves import Cut
from shardproof.optim import grad_norm
from shardproof.scheme import Scheme

HEADS = st.builds(
    lambda keys, group, head_dim, leaves, degree: Heads(
        keys * group, keys, head_dim, max(leaves, degree), degree
    ),
    keys=st.integers(1, 6),
    group=st.integers(1, 6),
    head_dim=st.integers(1, 4),
    leaves=st.integers(1, 12),
    degree=st.integers(1, 8),
)


@given(HEADS)
def test_every_key_head_is_owned_once_and_held_by_all_that_need_it(heads: Heads) -> None:
    owners: dict[int, int] = {}
    for rank in range(heads.degree):
        needed = {query // heads.group for query in heads.owned(rank)}
        assert needed == set(heads.held(rank))
        for key in heads.key_cut.run(rank):
            assert key not in owners
            owners[key] = rank
            assert key in heads.held(rank)
    for key in range(heads.keys):
        holders = [rank for rank in range(heads.degree) if key in heads.held(rank)]
        assert owners[key] == holders[0]
        assert (key in heads.shared()) == (len(holders) > 1)
        served = [heads.served(key, rank) for rank in range(heads.degree)]
        assert list(itertools.chain(*served)) == list(range(heads.group))


@given(HEADS)
def test_key_heads_of_a_leaf_do_not_depend_on_the_degree(heads: Heads) -> None:
    def by_leaf(some: Heads) -> dict[int, range]:
        found = {}
        for rank in range(some.degree):
            start = some.held(rank).start * some.head_dim
            for leaf, at in zip(some.query_cut.run(rank), some.key_slices(rank), strict=True):
                empty = at.start == at.stop
                found[leaf] = range(0) if empty else range(at.start + start, at.stop + start)
        return found

    alone = Heads(heads.queries, heads.keys, heads.head_dim, heads.leaves, 1)
    assert by_leaf(heads) == by_leaf(alone)
    features = sorted(itertools.chain(*by_leaf(heads).values()))
    assert features == list(range(heads.keys * heads.head_dim))


def test_four_heads_with_two_key_heads_at_degree_three() -> None:
    heads = Heads(queries=4, keys=2, head_dim=8, leaves=8, degree=3)
    assert [heads.owned(rank) for rank in range(3)] == [range(2), range(2, 3), range(3, 4)]
    assert [heads.held(rank) for rank in range(3)] == [range(1), range(1, 2), range(1, 2)]
    assert heads.shared() == (1,)
    assert heads.key_cut.owned(2) == range(16, 16)


def test_ranks_without_heads_are_idle() -> None:
    heads = Heads(queries=4, keys=1, head_dim=2, leaves=8, degree=6)
    assert heads.query_cut.idle_ranks() == (4, 5)
    assert heads.held(5) == range(0)
    assert heads.key_cut.sizes() == (2, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(("queries", "keys"), [(4, 3), (0, 1), (4, 0)])
def test_heads_that_cannot_be_shared_are_refused(queries: int, keys: int) -> None:
    with pytest.raises(ShapeError, match=r"cannot share .* key-value heads"):
        Heads(queries, keys, 8, 8, 2)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"size": 10, "unit": 4}, "into units of 4: they do not fill it"),
        ({"size": 4, "runs": (range(3), range(2, 4))}, "each leaf once and in rank order"),
        ({"size": 4, "runs": (range(4),)}, "each leaf once and in rank order"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused(cut: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Cut(leaves=8, degree=2, **cut)  # type: ignore[arg-type]


@EVERYWHERE
@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_what_ranks_hold_together_counts_once(
    degree: int, engine: str, numerics: str, pool: Pool
) -> None:
    for rank, (input_grad, weight_grad, norm) in enumerate(
        pool(degree, engine).run(functools.partial(_train_keys, numerics=numerics))
    ):
        reference, x, grad = _reference()
        y = reference(x)
        y.backward(grad)
        assert_close(input_grad, x.grad)
        heads = Heads(6, 2, 4, 8, degree)
        held = heads.held(rank)
        assert reference.weight.grad is not None
        assert reference.bias.grad is not None
        assert_close(weight_grad, reference.weight.grad[held.start * 4 : held.stop * 4])
        squares = reference.weight.grad.square().sum() + reference.bias.grad.square().sum()
        assert_close(norm, squares.sqrt())


def _reference() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(5, 8, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(torch.randn(8, 5, generator=draws))
        linear.bias.copy_(torch.randn(8, generator=draws))
    x = torch.randn(3, 5, generator=draws).requires_grad_()
    return linear, x, torch.randn(3, 8, generator=draws)


def _train_keys(axis, numerics):  # type: ignore[no-untyped-def]
    heads = Heads(6, 2, 4, 8, axis.size)
    linear, x, grad = _reference()
    held = heads.held(axis.rank)
    layer = ColumnParallelLinear.from_linear(
        linear,
        axis=axis,
        scheme=Scheme(numerics=numerics),
        cut=heads.key_cut,
        held=held,
        name="keys",
    )
    y = layer(x)
    y.backward(grad[:, held.start * 4 : held.stop * 4])
    return x.grad, layer.weight.grad, grad_norm(layer)
