"""Attention cut by heads against torch's own: every number, at every degree, and the same bits."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from invariance import all_bits_equal, bits_equal, normal, random_threads, strided, threads
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import ShapeError, UsageError
from shardproof.heads import Heads
from shardproof.leaves import Cut
from shardproof.numerics import mode, products
from shardproof.numerics.arithmetic import INVARIANT, NATIVE
from shardproof.numerics.attention_math import folded_softmax, softmax
from shardproof.numerics.batched_products import product_by_head
from shardproof.ops.attention import HeadDropout, attention
from shardproof.ops.head_split import HeadSplit
from shardproof.scheme import Numerics, Scheme
from shardproof.tree import nodes_of_run

Tensors = dict[str, Tensor]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 6e-2},
    torch.float16: {"rtol": 4e-3, "atol": 8e-3},
}


@dataclass(frozen=True)
class Setup:
    """One attention, its input, and how it is masked."""

    queries: int
    keys: int
    head_dim: int = 4
    batch: int = 2
    length: int = 5
    places: int = 5
    mask: str = ""
    softcap: float | None = None
    scale: float | None = None
    p: float | None = None
    dtype: torch.dtype = torch.float64
    numerics: Numerics = "invariant"

    def split(self, axis: Axis) -> HeadSplit:
        heads = Heads(self.queries, self.keys, self.head_dim, 8, axis.size)
        return HeadSplit(axis, heads, Scheme(numerics=self.numerics), "layers.0.attention")

    def data(self) -> list[Tensor]:
        """q, k, v and the gradient of y, whole; as a model has them, cut out of its features."""

        def draw(heads: int, length: int, seed: int) -> Tensor:
            drawn = normal(self.batch, length, heads * self.head_dim, seed=seed).to(self.dtype)
            return drawn.view(self.batch, length, heads, self.head_dim).transpose(1, 2)

        return [
            draw(self.queries, self.length, 1),
            draw(self.keys, self.places, 2),
            draw(self.keys, self.places, 3),
            draw(self.queries, self.length, 4),
        ]

    @property
    def drawn_mask(self) -> Tensor | None:
        if self.mask in ("", "causal"):
            return None
        sees = normal(self.batch, 1, self.length, self.places, seed=5) > -0.5
        sees[..., 0] = True
        sees[0, :, 1] = False  # one query that sees no key
        minimum = torch.finfo(self.dtype).min
        return {
            "bool": sees,
            "row": sees[0, 0],
            "keys": sees[:, :, :1] | sees.all(2, keepdim=True),
            "minimum": torch.zeros(sees.shape, dtype=self.dtype).masked_fill_(~sees, minimum),
            "infinite": torch.zeros(sees.shape).masked_fill_(~sees, float("-inf")),
            "slope": normal(1, 1, self.length, self.places, seed=6),
        }[self.mask]

    @property
    def dropout(self) -> HeadDropout | None:
        return None if self.p is None else HeadDropout(self.p, 7, "layers.0.attention", 3)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, split: HeadSplit) -> Tensor:
        return attention(
            q,
            k,
            v,
            split,
            mask=self.drawn_mask,
            is_causal=self.mask == "causal",
            scale=self.scale,
            softcap=self.softcap,
            dropout=self.dropout,
        )


GROUPINGS = [(4, 4), (8, 2), (4, 2), (6, 2), (5, 1), (9, 3)]
MASKS = ["", "causal", "bool", "row", "keys", "minimum", "infinite", "slope"]
SETUPS = [
    *[Setup(*grouping) for grouping in GROUPINGS],
    *[Setup(*grouping, length=1, places=7, head_dim=8) for grouping in GROUPINGS],
    *[Setup(6, 2, mask=mask) for mask in MASKS],
    *[Setup(6, 2, mask=mask, length=3, places=7) for mask in MASKS],
    Setup(6, 2, mask="causal", softcap=0.7, scale=0.3),
    Setup(8, 2, mask="minimum", softcap=5.0, p=0.4),
    Setup(8, 1, p=0.3),
    Setup(6, 3, p=1.0),
    Setup(6, 3, scale=2.0),
    Setup(1, 1),
    Setup(2, 1, batch=1, length=1, places=1, mask="causal"),
    Setup(4, 1, length=0),
    Setup(4, 1, batch=0),
]
# Where bits can differ: fp32, longer than one block of a product, odd.
LARGER = [
    replace(setup, dtype=torch.float32)
    for setup in [
        *[Setup(*grouping, head_dim=24, length=37, places=37) for grouping in GROUPINGS],
        *[Setup(*grouping, head_dim=24, length=1, places=300) for grouping in GROUPINGS[:2]],
        *[Setup(12, 2, head_dim=17, length=21, places=301, mask=mask) for mask in MASKS[:4]],
        Setup(16, 2, head_dim=16, length=290, places=290, mask="causal", batch=1),
        Setup(16, 1, head_dim=16, length=19, places=43, mask="causal", softcap=0.7, p=0.2),
    ]
]
HALVES = [
    replace(setup, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for setup in [
        Setup(8, 2, head_dim=16, length=21, places=21, mask="causal"),
        Setup(8, 1, head_dim=16, length=9, places=40, softcap=2.0, p=0.25),
    ]
]


def part(x: Tensor, heads: range) -> Tensor:
    return x[:, heads.start : heads.stop]


def joined(x: Tensor, split: HeadSplit) -> Tensor:
    """(B, owned, *) of every rank, (B, queries, *)."""
    cut = Cut(split.heads.queries, split.heads.leaves, split.axis.size)
    return comm.all_gather(x.detach(), split.axis, dim=1, cut=cut, direction="prover")


def computed(axis: Axis, setup: Setup) -> Tensors:
    """y and the gradient of q, put together from all ranks; those of k and v as the rank has it."""
    split = setup.split(axis)
    q, k, v, grad_y = setup.data()
    owned = [part(q, split.owned), part(k, split.held), part(v, split.held)]
    leaves = [x.detach().requires_grad_() for x in owned]
    before = [x.detach().clone() for x in leaves]
    y = setup(*leaves, split)
    y.backward(part(grad_y, split.owned))
    assert all_bits_equal(before, [x.detach() for x in leaves])
    grad_q, grad_k, grad_v = (x.grad for x in leaves)
    assert y.dtype == grad_q.dtype == grad_k.dtype == grad_v.dtype == setup.dtype
    return {"y": joined(y, split), "q": joined(grad_q, split), "k": grad_k, "v": grad_v}


def of_rank(whole: Tensors, axis: Axis, setup: Setup) -> Tensors:
    """What a rank should have of it."""
    held = setup.split(axis).held
    return {name: part(x, held) if name in "kv" else x for name, x in whole.items()}


@functools.cache
def expected(setup: Setup) -> Tensors:
    """What torch computes, with all heads; every rank and degree compares with these tensors."""
    q, k, v, grad_y = setup.data()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    group = setup.queries // setup.keys
    q, k, v = leaves[0], *(x.repeat_interleave(group, 1) for x in leaves[1:])
    mask = setup.drawn_mask
    if setup.mask == "causal":
        sees = torch.ones(setup.length, setup.places, dtype=torch.bool)
        mask = sees.tril(setup.places - setup.length)
    # Where a row has equal minima, the gradient of torch's fused kernel is that of other weights.
    is_exact = setup.mask != "minimum" or setup.numerics == "native"
    if setup.softcap is None and setup.p is None and is_exact:
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=setup.scale)
    else:
        y = step_by_step(q, k, v, mask, setup)
    y.backward(grad_y)
    return {"y": y.detach(), **{n: x.grad for n, x in zip("qkv", leaves, strict=True)}}


def step_by_step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setup: Setup) -> Tensor:
    """As the models' own eager attention has it."""
    scale = setup.head_dim**-0.5 if setup.scale is None else setup.scale
    scores = q.double() @ k.double().transpose(2, 3) * scale
    if setup.softcap is not None:
        scores = torch.tanh(scores / setup.softcap) * setup.softcap
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask
    weights = scores.softmax(-1)
    if setup.dropout is not None:
        shape = (setup.batch, setup.length, setup.places)
        keep = setup.dropout.keep(range(setup.queries), shape, q.device)
        weights = weights * keep * setup.dropout.scale
    return (weights @ v.double()).to(setup.dtype)


def check(axis: Axis, setups: list[Setup]) -> None:
    for setup in setups:
        found, wanted = computed(axis, setup), of_rank(expected(setup), axis, setup)
        for name, value in wanted.items():
            assert_close(
                found[name],
                value,
                **TOLERANCE[setup.dtype],
                msg=lambda m, s=setup, n=name: f"{s} {n}: {m}",
            )


@pytest.mark.parametrize(
    ("degree", "engine"), [(1, "threads"), (3, "threads"), (8, "threads"), (2, "processes")]
)
def test_every_number_is_that_of_torch(pool: Pool, degree: int, engine: str) -> None:
    pool(degree, engine).run(functools.partial(check, setups=[*SETUPS, *LARGER, *HALVES]))


def test_every_number_is_that_of_torch_at_four(pool: Pool) -> None:
    pool(4, "threads").run(functools.partial(check, setups=SETUPS))


@pytest.mark.parametrize(("degree", "engine"), [(1, "threads"), (3, "threads"), (2, "processes")])
def test_native_numbers_are_those_of_torch(pool: Pool, degree: int, engine: str) -> None:
    native = [replace(setup, numerics="native") for setup in [*SETUPS, *LARGER]]
    pool(degree, engine).run(functools.partial(check, setups=native))


def all_numbers(axis: Axis, setups: list[Setup], seed: int) -> list[Tensors]:
    """Computed under a schedule of 1 and 2 threads, where the contract has no thread count.

    Many ranks have one thread each: two of each would wait for each other.
    """
    found = []
    is_free = axis.size <= 3 and not mode.is_leafwise(torch.float32, torch.device("cpu"))
    for number, setup in enumerate(setups):
        schedule = random_threads(1000 * seed + 10 * number + axis.rank)
        with schedule if is_free else threads(1):
            found.append(computed(axis, setup))
    return found


def differing(setups: list[Setup], pool: Pool, places: list[tuple[int, str]]) -> Iterator[str]:
    """Where the bits are not those of one rank with one thread."""
    with threads(1):
        alone = [computed(Axis.solo(), setup) for setup in setups]
    for degree, engine in places:
        run = functools.partial(all_numbers, setups=setups, seed=degree)
        for rank, found in enumerate(pool(degree, engine).run(run)):
            for setup, whole, tensors in zip(setups, alone, found, strict=True):
                held = Heads(setup.queries, setup.keys, setup.head_dim, 8, degree).held(rank)
                for name, x in whole.items():
                    wanted = part(x, held) if name in "kv" else x
                    if not bits_equal(tensors[name], wanted):
                        yield f"{engine} {degree}, rank {rank}: {name} of {setup}"


THREADS = [(degree, "threads") for degree in (1, 2, 3, 4, 8)]


def test_every_number_has_the_same_bits_at_every_degree(pool: Pool) -> None:
    places = [(3, "threads"), (8, "threads"), (2, "processes")]
    assert list(differing([*LARGER, *HALVES], pool, places)) == []


@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_a_sum_in_rank_order_has_other_bits(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, numerics: Numerics
) -> None:
    """The negative controls of the bits: leaves that come from the degree, and native numerics."""
    setup = Setup(8, 1, head_dim=24, length=37, places=37, dtype=torch.float32, numerics=numerics)

    if numerics == "invariant":
        monkeypatch.setattr(type(INVARIANT), "add", type(NATIVE).add)
    found = list(differing([setup], pool, THREADS))
    assert any(": k of" in line for line in found)
    if numerics == "invariant":
        assert not any(": y of" in line or ": q of" in line for line in found)


def test_key_gradients_that_are_not_summed_over_ranks_are_seen(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_alone(self: HeadSplit, partials: Tensor, cut: Cut):  # type: ignore[no-untyped-def]
        keys = [key for key in self.held if key in self.heads.shared()]
        mine = {key: list(self._of_queries(key, partials).values()) for key in keys}
        group = self.heads.group
        return {key: {(0, group): functools.reduce(torch.add, mine[key])} for key in keys}

    monkeypatch.setattr(HeadSplit, "_gathered", own_alone)
    pool(2, "threads").run(functools.partial(check, setups=[Setup(4, 2)]))  # none is shared
    for degree in (2, 3):
        with pytest.raises(Exception, match=r"queries=4, keys=1.* k: Tensor-likes are not close"):
            pool(degree, "threads").run(functools.partial(check, setups=[Setup(4, 1)]))


def test_dropout_that_is_drawn_by_rank_is_seen(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_rank(self: HeadDropout, heads: range, shape, device):  # type: ignore[no-untyped-def]
        return HeadDropout.drawn(self, range(len(heads)), shape, device)  # type: ignore[attr-defined]

    setup = Setup(8, 2, head_dim=8, length=9, places=9, dtype=torch.float32, p=0.5)
    assert list(differing([setup], pool, THREADS)) == []
    monkeypatch.setattr(HeadDropout, "drawn", HeadDropout.keep, raising=False)
    monkeypatch.setattr(HeadDropout, "keep", by_rank)
    assert any(": y of" in line for line in differing([setup], pool, THREADS))


def test_dropout_keeps_its_share_and_depends_on_its_key() -> None:
    dropout = HeadDropout(0.25, seed=1, name="a", step=2)
    shape, device = (3, 40, 50), torch.device("cpu")
    keep = dropout.keep(range(4), shape, device)
    assert keep.shape == (3, 4, 40, 50)
    assert abs(keep.float().mean().item() - 0.75) < 0.01
    assert dropout.scale == 1 / 0.75
    assert torch.equal(dropout.keep(range(2, 4), shape, device), keep[:, 2:])
    assert not torch.equal(keep[:, 0], keep[:, 1])
    for change in ({"seed": 2}, {"name": "b"}, {"step": 3}):
        assert not torch.equal(replace(dropout, **change).keep(range(4), shape, device), keep)


def test_no_dropout_is_dropout_of_none() -> None:
    setup = Setup(4, 2, dtype=torch.float32, mask="causal")
    found = computed(Axis.solo(), replace(setup, p=0.0))
    assert all_bits_equal(list(found.values()), list(computed(Axis.solo(), setup).values()))


def test_a_token_at_a_time_gives_what_all_at_once_do(pool: Pool) -> None:
    setup = Setup(6, 2, head_dim=8, length=9, places=9, mask="causal", dtype=torch.float32)

    def run(axis: Axis) -> tuple[Tensor, Tensor]:
        split = setup.split(axis)
        q, k, v, _ = setup.data()
        q, k, v = part(q, split.owned), part(k, split.held), part(v, split.held)
        with torch.no_grad():
            whole = setup(q, k, v, split)
            steps = [
                attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], split, is_causal=True)
                for a, b in ((0, 4), (4, 5), (5, 6), (6, 9))
            ]
        return joined(whole, split), joined(torch.cat(steps, 2), split)

    alone = run(Axis.solo())
    assert_close(alone[0], alone[1], rtol=1e-5, atol=1e-6)
    for degree in (2, 3, 8):
        for found in pool(degree, "threads").run(run):
            assert all_bits_equal(found, alone)


@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_strides_change_no_bit(numerics: Numerics) -> None:
    setup = Setup(8, 2, 24, length=19, places=33, dtype=torch.float32, numerics=numerics, p=0.1)
    split = setup.split(Axis.solo())

    def run(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        q, k, v, grad_y = map(change, setup.data())
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        y = setup(*leaves, split)
        y.backward(grad_y)
        return [y.detach(), *(x.grad.contiguous() for x in leaves)]

    plain = run(lambda x: x.contiguous())
    if numerics == "invariant":
        for change in (lambda x: x, strided, lambda x: x.mT.contiguous().mT):
            assert all_bits_equal(run(change), plain)
    expanded = run(lambda x: x[:1, :1].expand_as(x))
    copied = run(lambda x: x[:1, :1].expand_as(x).contiguous())
    assert all_bits_equal(expanded, copied)
    negated = run(lambda x: torch._neg_view(-x))
    assert_close(negated, plain)


def ledger(axis: Axis, setup: Setup, wanted: str) -> dict[str, dict[str, dict[str, int]]]:
    """What one forward and backward costs if only some of q, k and v want a gradient."""
    split = setup.split(axis)
    q, k, v, grad_y = setup.data()
    owned = {"q": part(q, split.owned), "k": part(k, split.held), "v": part(v, split.held)}
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in owned.items()}
    axis.transport.ledger.reset()
    y = setup(**leaves, split=split)
    if wanted:
        y.backward(part(grad_y, split.owned))
    assert all((x.grad is not None) == (name in wanted) for name, x in leaves.items())
    return axis.transport.ledger.as_dict()


def test_one_all_gather_carries_what_is_shared_and_nothing_else_is_sent(pool: Pool) -> None:
    element = 2 * 5 * 4 * 8  # batch, places, head_dim, fp64

    def run(axis: Axis, setup: Setup, wanted: str) -> object:
        return ledger(axis, setup, wanted)

    def bytes_of(setup: Setup, degree: int, wanted: str) -> int:
        found = pool(degree, "threads").run(functools.partial(run, setup=setup, wanted=wanted))
        assert all(set(ledger) == {"backward"} for ledger in found)
        counts = [ledger["backward"] for ledger in found]
        assert all(set(count) == {"all_gather"} for count in counts)
        assert {count["all_gather"]["calls"] for count in counts} == {1}
        (size,) = {count["all_gather"]["message_bytes"] for count in counts}
        assert sum(count["all_gather"]["sent_bytes"] for count in counts) == (degree - 1) * size
        return size

    for numerics in ("invariant", "native"):
        one_key, shared = (Setup(*each, numerics=numerics) for each in ((8, 1), (4, 2)))
        assert bytes_of(one_key, 2, "qkv") == 2 * 2 * element
        # At degree 3 a rank of three heads has two nodes of the tree, and one sum.
        nodes = sum(len(nodes_of_run(8, run)) for run in (range(3), range(3, 6), range(6, 8)))
        assert bytes_of(one_key, 3, "kv") == 2 * element * (3 if numerics == "native" else nodes)
        assert bytes_of(one_key, 8, "v") == bytes_of(one_key, 8, "k") == 8 * element
        assert bytes_of(shared, 3, "qkv") == 2 * 2 * element
        for setup, degree, wanted in (
            (shared, 2, "qkv"),
            (Setup(8, 8, numerics=numerics), 8, "qkv"),
            (one_key, 3, "q"),
            (one_key, 3, ""),
        ):
            silent = functools.partial(run, setup=setup, wanted=wanted)
            assert pool(degree, "threads").run(silent) == [{}] * degree


@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_nothing_is_kept_where_no_gradient_is_wanted(numerics: Numerics) -> None:
    setup = Setup(4, 2, mask="causal", softcap=2.0, p=0.5, numerics=numerics)
    split = setup.split(Axis.solo())
    leaves = [x.requires_grad_() for x in setup.data()[:3]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        wanted = setup(*leaves, split)
        assert any(x.shape[2:] == (5, 5) for x in kept)
        kept.clear()
        with torch.no_grad():
            found = setup(*leaves, split)
        assert bits_equal(found, wanted.detach())
        assert not found.requires_grad
        setup(*(x.detach() for x in leaves), split)
    assert kept == []


def test_autocast_casts_and_computes_in_fp32() -> None:
    setup = Setup(4, 2, 8, mask="causal", dtype=torch.float32)
    split = setup.split(Axis.solo())
    q, k, v, grad_y = setup.data()

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = setup(*(x.to(dtype) for x in leaves), split)
            y.backward(grad_y.bfloat16())
        assert y.dtype == torch.bfloat16
        return [y.detach(), *(x.grad for x in leaves)]

    assert all_bits_equal(run(torch.float32), run(torch.bfloat16))


def test_a_second_backward_is_refused() -> None:
    setup = Setup(4, 2)
    leaves = [x.requires_grad_() for x in setup.data()[:3]]
    y = setup(*leaves, setup.split(Axis.solo()))
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_softmax_does_not_see_where_its_row_lies() -> None:
    for places in (1, 7, 64, 301):
        scores = 9 * normal(3, 5, 11, places)
        for f in (softmax, folded_softmax):
            with threads(1):
                whole = f(scores)
            assert_close(whole, scores.softmax(-1))
            with threads(2):
                assert bits_equal(f(scores), whole)
                assert bits_equal(f(scores[:, 2:4].contiguous()), whole[:, 2:4])
                assert bits_equal(f(scores[1, 2, 3].clone()), whole[1, 2, 3])
    assert folded_softmax(torch.empty(2, 3, 0)).shape == (2, 3, 0)


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_product_by_head_is_a_product_for_each(
    monkeypatch: pytest.MonkeyPatch, is_ours: bool
) -> None:
    if not is_ours:
        monkeypatch.setattr(products, "are_ours", lambda a, b, rows: False)
    a, b = normal(2, 4, 7, 5), normal(2, 2, 5, 3, seed=1)
    wanted = a @ b[:, [0, 0, 1, 1]]
    for left in (a, a.mT.contiguous().mT):
        found = product_by_head(left, b, rows=7, serving=(0, 0, 1, 1))
        assert_close(found, wanted)
        turned = product_by_head(left, b.mT, rows=7, serving=(0, 0, 1, 1), is_transposed=True)
        assert_close(turned, wanted)
        some = product_by_head(left[:, 1:3], b, rows=7, serving=(0, 1))
        assert bits_equal(some, found[:, 1:3])
    out = torch.full((2, 4, 7, 3), 9.0)
    assert product_by_head(a, b, rows=7, serving=(0, 0, 1, 1), out=out) is out
    assert bits_equal(out, found)
    assert product_by_head(a[..., :0], b[:, :, :0], rows=7, serving=(0,) * 4).eq(0).all()


HEADS = (8, 2, 4)


def call(**changes: object) -> Tensor:
    """A good call with some of its arguments changed."""
    split = HeadSplit(Axis.solo(), Heads(*HEADS, 8, 1), Scheme(), "layers.0.attention")
    q, kv = torch.ones(2, 8, 3, 4), torch.ones(2, 2, 5, 4)
    given = {"q": q, "k": kv, "v": kv, "split": split}
    return attention(**given | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.ones(2, 7, 3, 4)}, ShapeError, r"owns 8 of 8 query heads.*q \(batch, 8, T, 4"),
        ({"q": torch.ones(3, 8, 3, 4)}, ShapeError, r"0.attention on .* q has shape \(3, 8, 3, 4"),
        ({"q": torch.ones(8, 3, 4)}, ShapeError, r"q has shape \(8, 3, 4\)"),
        ({"k": torch.ones(2, 8, 5, 4)}, ShapeError, r"k \(2, 8, 5, 4\) and v \(2, 2, 5, 4\)"),
        ({"q": torch.ones(2, 8, 3, 5)}, ShapeError, r"holds 2 of 2 key-value heads of 4 features"),
        ({"q": torch.ones(2, 8, 3, 4).half()}, ShapeError, r"q is torch.float16 on cpu, k is"),
        ({"mask": torch.ones(2, 8, 3, 5) > 0}, ShapeError, r"has 8 entries along its head dim"),
        ({"mask": torch.ones(8, 3, 5) > 0}, ShapeError, r"\(8, 3, 5\) has 8 entries"),
        ({"mask": torch.ones(2, 1, 3, 4) > 0}, ShapeError, r"broadcast to .* = \(2, 1, 3, 5\)"),
        ({"mask": torch.ones(1, 2, 1, 3, 5) > 0}, ShapeError, r"mask of shape \(1, 2, 1, 3, 5\)"),
        ({"mask": torch.ones(3, 5).long()}, UsageError, r"the mask is torch.int64. Use bool"),
        (
            {"mask": torch.ones(3, 5, device="meta")},
            ShapeError,
            r"the mask is on meta and q on cpu",
        ),
        ({"mask": torch.ones(3, 5, requires_grad=True)}, UsageError, r"Use mask.detach\(\)"),
        ({"mask": torch.ones(3, 5), "is_causal": True}, UsageError, r"both a mask and is_causal"),
        (
            {"q": torch.ones(2, 8, 6, 4), "is_causal": True},
            ShapeError,
            r"6 queries and 5 keys: the first queries would see none",
        ),
        ({"softcap": 0.0}, UsageError, r"softcap=0.0 is not positive"),
    ],
)
def test_what_makes_no_sense_is_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    call()
    with pytest.raises(error, match=message):
        call(**changes)


def test_integers_are_refused() -> None:
    q, kv = torch.ones(2, 8, 3, 4).int(), torch.ones(2, 2, 5, 4).int()
    with pytest.raises(UsageError, match=r"q is torch.int32, and float32"):
        call(q=q, k=kv, v=kv)


def test_heads_of_another_degree_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"shared by 2 ranks, and the axis has 1"):
        HeadSplit(Axis.solo(), Heads(*HEADS, 8, 2), Scheme())


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(UsageError, match=rf"dropout of 'a': p={p} is no probability"):
        HeadDropout(p, 0, "a", 0)
