"""Projections of one input: every number against plain torch, the same bits, and one sum."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from invariance import bits_equal, random_threads, strided
from places import Pool
from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.errors import UsageError
from shardproof.heads import Heads
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.layers.shared import link
from shardproof.leaves import Cut
from shardproof.numerics import mode, products, summed_products
from shardproof.ops import shared
from shardproof.ops.shared import SharedSum, shared_columns
from shardproof.scheme import Scheme
from shardproof.transport.base import Call, Pending, Transport
from shared_group import (
    GROUPS,
    LARGER,
    Group,
    Tensors,
    computed,
    expected,
    held_of,
    held_part,
    step,
)

PLACES = [(2, "threads"), (3, "threads"), (8, "threads")]
NUMERICS = pytest.mark.parametrize("numerics", ["invariant", "native"])


def check_against_torch(axis: Axis, numerics: str) -> None:
    for given in [*GROUPS, *LARGER]:
        group = replace(given, numerics=numerics)
        layers = group.layers(axis)
        # Plain torch has one arithmetic, so that both numerics compare with the same tensors.
        found, wanted = step(group, layers), held_of(expected(given), group, layers)
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            assert_close(
                found[name],
                value,
                **group.tolerance,
                msg=lambda m, g=group, n=name: f"{g} {n}: {m}",
            )


@pytest.mark.parametrize(
    ("numerics", "degree", "engine"),
    [
        *[("invariant", *place) for place in [(1, "threads"), (3, "threads"), (8, "threads")]],
        *[("native", *place) for place in [(1, "threads"), (3, "threads")]],
        ("invariant", 2, "processes"),
    ],
)
def test_every_number_is_that_of_plain_torch(
    pool: Pool, numerics: str, degree: int, engine: str
) -> None:
    pool(degree, engine).run(lambda axis: check_against_torch(axis, numerics))


def all_numbers(
    axis: Axis, groups: Sequence[Group], seed: int, used: tuple[int, ...] | None = None
) -> list[Tensors]:
    """Under a schedule of 1 and 2 threads, where the contract has no thread count.

    Many ranks have one thread each: two of each would wait for each other.
    """
    found = []
    for number, group in enumerate(groups):
        if group.dtype == torch.bfloat16 or axis.size > 3:
            found.append(computed(axis, group, used))
            continue
        with random_threads(1000 * seed + 10 * number + axis.rank):
            found.append(computed(axis, group, used))
    return found


def differing(found: Sequence[Tensors], alone: Sequence[Tensors]) -> list[str]:
    names = []
    for number, (a, b) in enumerate(zip(found, alone, strict=True)):
        assert set(a) == set(b)
        names += [f"{number} {name}" for name in a if not bits_equal(a[name], b[name])]
    return names


def differing_anywhere(
    pool: Pool,
    run: Callable[[Axis, int], list[Tensors]],
    places: Sequence[tuple[int, str]],
) -> list[str]:
    """What at some place has other bits than at degree 1."""
    (alone,) = pool(1, "threads").run(lambda axis: run(axis, 0))
    names = []
    for degree, engine in places:
        ranks = pool(degree, engine).run(lambda axis, seed=degree: run(axis, seed))
        for rank, found in enumerate(ranks):
            names += [f"{engine} {degree} rank {rank}: {n}" for n in differing(found, alone)]
    return names


def test_every_number_has_the_same_bits_at_every_degree(pool: Pool) -> None:
    single = [replace(group, dtype=torch.float32) for group in GROUPS]
    run = lambda axis, seed: all_numbers(axis, [*single, *LARGER], seed)  # noqa: E731
    assert differing_anywhere(pool, run, [(3, "threads"), (8, "threads"), (3, "processes")]) == []


def test_native_has_other_bits(pool: Pool) -> None:
    """The negative control of this file."""
    groups = [replace(g, numerics="native") for g in LARGER if g.dtype == torch.float32]
    places = [(3, "threads")]
    found = differing_anywhere(pool, lambda axis, seed: all_numbers(axis, groups, seed), places)
    assert any("x.grad" in name for name in found)


def test_outputs_and_weight_gradients_have_the_bits_of_layers_that_are_not_linked(
    pool: Pool,
) -> None:
    def run(axis: Axis) -> list[str]:
        groups = [group for group in LARGER if group.dtype == torch.float32]
        alone = [computed(axis, replace(group, is_linked=False)) for group in groups]
        return differing([computed(axis, group) for group in groups], alone)

    for found in pool(3, "threads").run(run):
        assert found != []
        assert all(name.endswith(" x.grad") for name in found)


@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 2)])
def test_members_without_a_gradient_are_left_out(pool: Pool, used: tuple[int, ...]) -> None:
    """Without the queries some leaves have nothing at all."""
    groups = [group for group in LARGER if group.head_dim and group.dtype == torch.float32][::2]
    places = [(3, "threads")]

    def run(axis: Axis, seed: int) -> list[Tensors]:
        return all_numbers(axis, groups, seed, used)

    assert differing_anywhere(pool, run, places) == []
    for found in pool(3, "threads").run(lambda axis: run(axis, 0)):
        for group, tensors in zip(groups, found, strict=True):
            wanted = expected(group, used)
            assert set(tensors) == set(wanted)
            for name, value in wanted.items():
                assert_close(tensors[name], value, **group.tolerance)


def ledger(axis: Axis, group: Group, *, frozen_x: bool = False) -> list[tuple[str, str, int, int]]:
    layers, (x, grads) = group.layers(axis), group.data()
    axis.transport.ledger.reset()
    x.requires_grad_(not frozen_x)
    outputs = [layer(x) for layer in layers]
    parts = [held_part(grad, layer) for grad, layer in zip(grads, layers, strict=True)]
    torch.autograd.backward(outputs, parts)
    return [(*key, count.calls, count.message_bytes) for *key, count in axis.transport.ledger]


@pytest.mark.parametrize("degree", [2, 3])
@NUMERICS
def test_a_group_makes_one_all_reduce(pool: Pool, degree: int, numerics: str) -> None:
    for given in (GROUPS[0], GROUPS[5]):
        group = replace(given, numerics=numerics)
        size = 8 * 3 * group.in_features
        for found in pool(degree, "threads").run(lambda axis, g=group: ledger(axis, g)):
            assert found == [("backward", "all_reduce", 1, size)]
        alone, members = replace(group, is_linked=False), len(group.names)
        for found in pool(degree, "threads").run(lambda axis, g=alone: ledger(axis, g)):
            assert found == [("backward", "all_reduce", members, members * size)]


def test_an_input_without_gradient_costs_no_collective(pool: Pool) -> None:
    for group in (GROUPS[0], GROUPS[5]):
        run = lambda axis, g=group: ledger(axis, g, frozen_x=True)  # noqa: E731
        assert pool(3, "threads").run(run) == [[], [], []]


class Watched(Pending):
    """A sum that tells when it is waited for."""

    def __init__(self, inner: Pending, log: list[str]) -> None:
        self.inner, self.log = inner, log

    def wait(self) -> None:
        self.log.append("wait")
        self.inner.wait()


@Transport.register
class Watching:
    """A transport that tells what sums are started, and when they are waited for."""

    def __init__(self, axis: Axis, log: list[str], *, is_asynchronous: bool) -> None:
        self._inner, self._log, self.is_asynchronous = axis.transport, log, is_asynchronous

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start_sum(self, *args: Any, call: Call, **named: Any) -> Pending:
        self._log.append(call.who)
        return Watched(self._inner.start_sum(*args, call=call, **named), self._log)


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_weight_gradients_are_computed_while_the_sum_runs(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, is_asynchronous: bool
) -> None:
    logs: tuple[list[str], list[str]] = ([], [])
    product = shared.weight_gradient

    def logged(a: Tensor, b: Tensor, split: Split) -> Tensor:
        logs[split.axis.rank].append(split.name)
        return product(a, b, split)

    monkeypatch.setattr(shared, "weight_gradient", logged)

    def run(axis: Axis) -> None:
        log = logs[axis.rank]
        transport = Watching(axis, log, is_asynchronous=is_asynchronous)
        own = dataclasses.replace(axis, transport=transport)
        step(GROUPS[5], GROUPS[5].layers(own))

    pool(2, "threads").run(run)
    start = ["layers.0.self_attn", *([] if is_asynchronous else ["wait"])]
    end = ["wait"] if is_asynchronous else []
    assert logs == ([*start, "q", "k", "v", *end],) * 2


@pytest.mark.parametrize(
    "frozen", [("q.weight",), ("k.weight", "v.bias"), ("q.weight", "k.weight", "v.weight")]
)
def test_frozen_parameters_leave_the_other_gradients_as_they_are(
    pool: Pool, frozen: tuple[str, ...]
) -> None:
    group = LARGER[2]

    def run(axis: Axis) -> tuple[Tensors, Tensors]:
        layers = group.layers(axis)
        named = dict(zip(group.names, layers, strict=True))
        for name in frozen:
            member, _, parameter = name.partition(".")
            named[member].get_parameter(parameter).requires_grad_(False)
        return step(group, layers), step(group, group.layers(axis))

    for found, wanted in pool(3, "threads").run(run):
        missing = {f"{name}.grad" for name in frozen}
        assert set(wanted) - set(found) == missing
        assert all(bits_equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(
    "change", [strided, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)]
)
def test_views_give_the_same_bits(pool: Pool, change: Callable[[Tensor], Tensor]) -> None:
    group = Group((6, 2), 24, in_features=65, leading=(4, 5), dtype=torch.float32)

    def run(axis: Axis, is_changed: bool) -> list[Tensor]:
        layers, (x, grads) = group.layers(axis), group.data()
        parts = [held_part(grad, layer) for grad, layer in zip(grads, layers, strict=True)]
        keep = change if is_changed else Tensor.contiguous
        x = keep(x).detach().requires_grad_()
        torch.autograd.backward([layer(x) for layer in layers], [keep(part) for part in parts])
        return [x.grad, *[layer.weight.grad for layer in layers]]

    views = pool(3, "threads").run(lambda axis: run(axis, True))
    copies = pool(3, "threads").run(lambda axis: run(axis, False))
    for found, wanted in zip(views, copies, strict=True):
        assert all(bits_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_where_products_are_called_in_leaf_shapes_the_bits_are_the_same(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "are_ours", lambda *_: False)
    monkeypatch.setattr(mode, "is_leafwise", lambda *_: True)
    groups = [group for group in LARGER if group.dtype == torch.float32]

    def run(axis: Axis, _: int) -> list[Tensors]:
        return [computed(axis, group) for group in groups]  # one thread: it is in that contract

    assert differing_anywhere(pool, run, [(3, "threads")]) == []
    for found in pool(3, "threads").run(lambda axis: run(axis, 0)):
        for group, tensors in zip(groups, found, strict=True):
            for name, value in expected(group).items():
                assert_close(tensors[name], value, **group.tolerance)


@pytest.mark.parametrize("limit", [0, 384])
def test_where_the_library_multiplies_the_numbers_are_right(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The way of strict mode; the bits of this library are not promised here."""
    monkeypatch.setattr(products, "are_ours", lambda *_: False)
    monkeypatch.setattr(mode, "is_leafwise", lambda *_: False)
    monkeypatch.setattr(mode, "addmm_limit", lambda _: limit)
    for found in pool(3, "threads").run(lambda axis: [computed(axis, group) for group in GROUPS]):
        for group, tensors in zip(GROUPS, found, strict=True):
            for name, value in expected(group).items():
                assert_close(tensors[name], value, **group.tolerance)


def test_a_pure_function_is_there_too(pool: Pool) -> None:
    """Given weights and biases; without gradients as well."""
    group = LARGER[2]

    def run(axis: Axis) -> bool:
        layers, (x, grads) = group.layers(axis), group.data()
        site = SharedSum.of([la.split for la in layers], heads=group.heads(axis.size), who="attn")
        weights, biases = [la.weight for la in layers], [la.bias for la in layers]
        wanted = step(group, layers)
        x.requires_grad_()
        outputs = shared_columns(x, weights, biases, site)
        parts = [held_part(grad, layer) for grad, layer in zip(grads, layers, strict=True)]
        torch.autograd.backward(outputs, parts)
        with torch.no_grad():
            again = shared_columns(x, weights, biases, site)
        is_same = all(map(bits_equal, again, outputs)) and not again[0].requires_grad
        return is_same and bits_equal(x.grad, wanted["x.grad"])

    assert all(pool(3, "threads").run(run))


def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank counts all key-value heads that it holds, in its first leaf."""

    def key_slices(heads: Heads, rank: int) -> tuple[slice, ...]:
        held, leaves = heads.held(rank), heads.query_cut.run(rank)
        all_held = slice(0, len(held) * heads.head_dim)
        return (all_held, *[slice(0, 0)] * (len(leaves) - 1)) if leaves else ()

    monkeypatch.setattr(Heads, "key_slices", key_slices)


def test_a_head_that_is_counted_by_all_who_hold_it_is_found(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = replace(LARGER[4], dtype=torch.float64)
    assert group.widths == (4, 1)
    wanted = expected(group)["x.grad"]
    planted(monkeypatch)
    for degree in (1, 2, 4):
        for found in pool(degree, "threads").run(lambda axis: computed(axis, group)):
            if degree == 1:
                assert_close(found["x.grad"], wanted, **group.tolerance)
            else:
                assert (found["x.grad"] - wanted).abs().max() > 1
    run = lambda axis, seed: all_numbers(axis, [group], seed)  # noqa: E731
    assert "threads 2 rank 0: 0 x.grad" in differing_anywhere(pool, run, PLACES)


def test_a_head_that_is_counted_by_all_is_found_in_native_too(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = replace(LARGER[4], dtype=torch.float64, numerics="native")
    wanted = expected(group)["x.grad"]
    monkeypatch.setattr(shared._MemberTerm, "owned", lambda term: (term.grad, term.weight))
    for found in pool(2, "threads").run(lambda axis: computed(axis, group)["x.grad"]):
        assert (found - wanted).abs().max() > 1


def test_members_that_are_added_one_tree_after_another_are_found(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of each member's own, added up: right, and of other bits at other degrees."""
    correct = summed_products.joined_nodes

    def apart(pairs: Any, slices: Any, **named: Any) -> Any:
        each = [correct([pair], [at], **named) for pair, at in zip(pairs, slices, strict=True)]
        return {node: sum(found[node] for found in each) for node in each[0]}

    monkeypatch.setattr("shardproof.numerics.arithmetic.joined_nodes", apart)
    found = differing_anywhere(pool, lambda axis, seed: all_numbers(axis, LARGER[:1], seed), PLACES)
    assert "threads 2 rank 0: 0 x.grad" in found
    assert all(name.endswith("x.grad") for name in found)


def layer(axis: Axis, width: int = 16, **named: Any) -> ColumnParallelLinear:
    return ColumnParallelLinear(named.pop("in_features", 12), width, axis=axis, **named)


def refused(axis: Axis) -> dict[str, str]:
    heads, scheme = Heads(4, 2, 4, 8, axis.size), Scheme(seed=1)
    query = layer(axis, cut=heads.query_cut, name="q")
    keys = [layer(axis, 8, cut=heads.key_cut, held=heads.held(axis.rank), name=n) for n in "kv"]
    once = [layer(axis, name="gate"), layer(axis, name="up")]
    link(once, who="mlp")
    given: dict[str, tuple[list[Any], Heads | None]] = {
        "one": ([layer(axis)], None),
        "a plain linear": ([layer(axis), torch.nn.Linear(12, 16)], None),
        "linked": ([layer(axis), once[0]], None),
        "twice": ([query, query], None),
        "widths": ([layer(axis, name="a"), layer(axis, in_features=13)], None),
        "schemes": ([layer(axis, name="a"), layer(axis, name="b", scheme=scheme)], None),
        "axes": ([layer(axis, name="a"), layer(Axis.solo(), name="b")], None),
        "gathers": ([layer(axis), layer(axis, gather_output=True, name="b")], None),
        "gathers input": ([layer(axis, gather_input=True, name="b"), layer(axis)], None),
        "cuts": ([layer(axis, name="a"), layer(axis, 17, name="b")], None),
        "heads without": ([query, *keys], None),
        "two with heads": ([query, keys[0]], heads),
        "order": ([keys[0], query, keys[1]], heads),
        "keys": ([query, layer(axis, 8, name="k"), keys[1]], heads),
        "held": ([query, keys[0], layer(axis, 8, cut=heads.key_cut, name="v")], heads),
    }
    found = {}
    for name, (members, with_heads) in given.items():
        with pytest.raises(UsageError) as caught:
            link(members, heads=with_heads, who="layers.3")
        found[name] = str(caught.value)
    assert not any(member.is_shared for member in [query, *keys])
    return found


def test_what_cannot_share_a_sum_is_refused_on_all_ranks(pool: Pool) -> None:
    wanted = {
        "one": "1 members cannot share a sum. Give two or more",
        "a plain linear": "Linear cannot share the sum of its input gradient, which Column",
        "linked": "'gate' is linked already, or named twice. Link each layer once",
        "twice": "'q' is linked already, or named twice",
        "widths": r"inputs of [12, 13] features cannot be the same input",
        "schemes": "seed=1), 'a' on rank",
        "axes": "'b' is cut on rank 0 of 1 on axis 'tp' with",
        "gathers": "'b' gathers its input or its output, and the gradient of that is not summed",
        "gathers input": "'b' gathers its input or its output",
        "cuts": "'b' is cut as Cut(size=17",
        "heads without": "'k' is cut as Cut(size=8",
        "two with heads": "2 members were given with heads, which cut three: query, key and value",
        "order": "'k' is cut as Cut(size=8, leaves=8, degree=4, unit=4",
        "keys": "'k' is cut as Cut(size=8, leaves=8, degree=4, unit=1, runs=None), and the keys'",
        "held": "Cut it with held=heads.held(axis.rank).",
    }
    for found in pool(4, "threads").run(refused):
        assert set(found) == set(wanted)
        for name, message in found.items():
            assert message.startswith("layers.3: ")
            assert wanted[name] in message, (name, message)


def test_heads_of_another_number_of_ranks_are_refused() -> None:
    heads, other = Heads(4, 2, 4, 8, 1), Heads(4, 2, 4, 8, 2)
    axis = Axis.solo()
    members = [
        layer(axis, cut=heads.query_cut, name="q"),
        *[layer(axis, 8, cut=heads.key_cut, held=range(2), name=name) for name in "kv"],
    ]
    with pytest.raises(UsageError, match=r"'q' is cut as Cut\(size=16, leaves=8, degree=1"):
        link(members, heads=other, who="attn")
    link(members, heads=heads, who="attn")
    assert all(member.is_shared for member in members)


def test_one_rank_with_native_numerics_stays_torchs_own_linear() -> None:
    group = replace(GROUPS[0], numerics="native")
    layers = group.layers(Axis.solo())
    assert not any(member.is_shared for member in layers)
    x, _ = group.data()
    assert type(layers[0](x.requires_grad_()).grad_fn).__name__ == "AddmmBackward0"


def test_a_cut_of_heads_and_one_of_features_do_not_line_up() -> None:
    """The sizes are the same, and the leaves are not."""
    heads = Heads(3, 3, 8, 8, 1)
    axis = Axis.solo()
    members = [layer(axis, 24, cut=heads.query_cut, name="q"), layer(axis, 24, name="k")]
    with pytest.raises(UsageError, match=r"their leaves do not line up\. Give layers of one"):
        link(members, who="attn")
    assert members[1].split.cut == Cut(24, 8, 1)
