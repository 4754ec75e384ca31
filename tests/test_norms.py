"""Norms: torch's and the models' own values, and the same bits at every degree and thread count."""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from invariance import (
    Tally,
    bits_equal,
    misaligned,
    normal,
    random_threads,
    strided,
    threads_tally,
)
from places import EVERYWHERE, Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.errors import ShapeError, UsageError
from shardproof.heads import Heads
from shardproof.layers import norm as layers
from shardproof.layers.activations import invariant_replacement
from shardproof.layers.rms_formula import find_formula
from shardproof.leaves import Cut
from shardproof.numerics.sums import sum_squares_rows
from shardproof.ops import cut_norms
from shardproof.ops.norms import (
    head_rms_norm,
    layer_norm,
    rms_norm,
    sharded_rms_norm,
)
from shardproof.ops.rms_norm import RmsFormula
from shardproof.optim import grad_norm, gradient_norms, layouts
from shardproof.scheme import Numerics, Scheme

Tensors = dict[str, Tensor]
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
PLAIN = RmsFormula(1e-6)
SHAPES = [(37, 509), (2, 3, 16), (1, 1), (5, 1), (3, 0, 7), (129, 130), (11,)]


def parameter(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter((1 + 0.3 * normal(*shape, seed=seed)).to(dtype))


def step(
    f: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor, *weights: Tensor
) -> list[Tensor]:
    """y and the gradients of x and of the weights; `x` keeps its strides."""
    x = x.detach().requires_grad_()
    for weight in weights:
        weight.grad = None
    y = f(x)
    y.backward(grad_y)
    grads = [value.grad for value in (x, *weights)]
    assert all(grad is not None for grad in grads)
    return [y.detach(), *(grad for grad in grads if grad is not None)]


# Of activations that every rank holds.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_whole_norms_are_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """In bf16 torch's in fp32: its own sums over rows round in between."""
    size, wide = shape[-1], torch.float64 if dtype == torch.float64 else torch.float32
    x, grad_y = 2 * normal(*shape).to(dtype) + 0.5, normal(*shape, seed=1).to(dtype)
    w, b = parameter(size, seed=2, dtype=dtype), parameter(size, seed=3, dtype=dtype)
    w2, b2 = (value.detach().to(wide).requires_grad_() for value in (w, b))
    f = nn.functional
    pairs: list[tuple[Any, Any, list[Tensor], list[Tensor]]] = [
        (
            lambda x: rms_norm(x, w, eps=1e-6),
            lambda x: f.rms_norm(x, (size,), w2, 1e-6),
            [w],
            [w2],
        ),
        (lambda x: rms_norm(x, None, eps=None), lambda x: f.rms_norm(x, (size,)), [], []),
        (
            lambda x: layer_norm(x, w, b, eps=1e-5),
            lambda x: f.layer_norm(x, (size,), w2, b2, 1e-5),
            [w, b],
            [w2, b2],
        ),
        (lambda x: layer_norm(x, w, None), lambda x: f.layer_norm(x, (size,), w2), [w], [w2]),
        (lambda x: layer_norm(x, None, None), lambda x: f.layer_norm(x, (size,)), [], []),
    ]
    tolerance = dict(TOLERANCE[dtype])
    if dtype == torch.float32:
        tolerance["atol"] *= 10  # sums of up to 129 products
    if size == 1:  # differences of nearly equal numbers, over the root of eps
        tolerance["atol"] = 1e-2 if dtype != torch.float64 else 1e-9
    for ours, torchs, weights, theirs in pairs:
        before = x.clone()
        found = step(ours, x, grad_y, *weights)
        wanted = step(torchs, x.to(wide), grad_y.to(wide), *theirs)
        assert torch.equal(x, before)
        for value, other in zip(found, wanted, strict=True):
            assert value.dtype == dtype
            assert_close(value, other.to(dtype), **tolerance)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(100, 509), (1, 40_001), (2500, 17)], ids=str)
def test_bits_of_whole_norms_depend_on_no_threads_and_no_strides(
    norm: Any, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x, grad_y = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    weights = {"weight": parameter(shape[1], seed=2)}
    if norm is layer_norm:
        weights["bias"] = parameter(shape[1], seed=3)
    tally, ours = Tally(), functools.partial(norm, **weights, eps=1e-6)
    threads_tally(lambda: step(ours, x, grad_y, *weights.values()), tally, schedules=1)
    expected = step(ours, x, grad_y, *weights.values())
    for same in (strided, lambda t: misaligned(t, 1), lambda t: t.t().contiguous().t()):
        found = step(ours, same(x), same(grad_y), *weights.values())
        tally.add(all(map(bits_equal, found, expected)))
    tally.expect_holds(norm.__name__)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_rows_do_not_know_of_each_other(norm: Any) -> None:
    x = normal(37, 509)
    given = {"weight": normal(509, seed=1), "eps": 1e-6}
    given |= {"bias": None} if norm is layer_norm else {}
    y = norm(x, **given)
    assert bits_equal(torch.cat([norm(x[i : i + 1], **given) for i in range(37)]), y)


def test_where_bf16_is_rounded() -> None:
    x, w = normal(50, 64).bfloat16(), normal(64, seed=1).bfloat16()
    wide = x.float()
    normed = wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    llama = rms_norm(x, w, eps=1e-6, rounds_before_weight=True)
    gemma = rms_norm(x, w, eps=1e-6, offset=1.0)
    assert bits_equal(llama, normed.bfloat16() * w)
    assert bits_equal(gemma, (normed * (1 + w.float())).bfloat16())
    # Negative control: the other order gives other bits.
    assert not bits_equal(llama, (normed * w.float()).bfloat16())
    assert rms_norm(x, w.float(), eps=1e-6, rounds_before_weight=True).dtype == torch.float32
    assert rms_norm(x, w.float(), eps=1e-6).dtype == torch.bfloat16


def test_gradient_of_a_rounded_norm_takes_what_was_multiplied() -> None:
    x, w = normal(50, 64).bfloat16(), parameter(64, seed=1, dtype=torch.bfloat16)
    grad_y = normal(50, 64, seed=2).bfloat16()
    f = functools.partial(rms_norm, weight=w, eps=1e-6, rounds_before_weight=True)
    grad = step(f, x, grad_y, w)[2]
    normed = rms_norm(x, None, eps=1e-6)
    assert_close(grad, (grad_y.double() * normed.double()).sum(0).bfloat16(), rtol=1e-2, atol=1e-2)


def test_gradients_of_first_order_and_none_of_second() -> None:
    x = normal(3, 5).double().requires_grad_()
    w, b = normal(5, seed=1).double().requires_grad_(), normal(5, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, eps=1e-3, offset=1.0), (x, w))
    assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, eps=1e-3), (x, w, b))
    for y in (rms_norm(x, w, eps=1e-3), layer_norm(x, w, b)):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_what_needs_no_gradient_gets_none() -> None:
    x, w, b = normal(3, 5), parameter(5, seed=1), parameter(5, seed=2)
    w.requires_grad_(False)
    y = layer_norm(x, w, b)
    y.sum().backward()
    assert w.grad is None
    assert b.grad is not None
    y = rms_norm(x.requires_grad_(), w, eps=1e-6)
    y.backward(torch.ones(3, 5))
    assert x.grad is not None
    y.detach_().zero_()  # ours to write: no view of anything


def test_autocast_leaves_the_bits_alone() -> None:
    x, grad_y, w, b = normal(30, 11), normal(30, 11, seed=1), parameter(11, seed=2), normal(11)
    split = Setup("heads", (1, 1, 11)).split(Axis.solo())
    for f in (
        lambda x: rms_norm(x, w, eps=1e-6),
        lambda x: layer_norm(x, w, b),
        lambda x: head_rms_norm(x.view(30, 1, 11), w, split, PLAIN).view(30, 11),
        lambda x: sharded_rms_norm(x, w, split, PLAIN),
    ):
        wanted = step(f, x, grad_y, w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(map(bits_equal, step(f, x, grad_y, w), wanted))


def test_a_weight_that_does_not_fit_raises() -> None:
    with pytest.raises(
        ShapeError, match=re.escape("weight of shape (4,) wanted for x of shape (2, 5)")
    ):
        rms_norm(torch.ones(2, 5), torch.ones(4), eps=1e-6)
    with pytest.raises(ShapeError, match=re.escape("bias of shape (1,) wanted for x")):
        layer_norm(torch.ones(2, 5), None, torch.ones(1))
    with pytest.raises(ShapeError, match="x has no dim to go over"):
        layer_norm(torch.ones(()), None, None)
    with pytest.raises(
        ShapeError, match=re.escape("LayerNorm of size 5 takes (*, 5), got shape (2, 4)")
    ):
        layers.LayerNorm(5)(torch.ones(2, 4))


# Of what is cut.


@dataclass(frozen=True)
class Setup:
    """One norm of heads, its input and its gradient."""

    kind: str  # "across" all heads, or "heads"
    heads: tuple[int, int, int] = (6, 2, 5)  # queries, keys, head_dim
    of_keys: bool = False
    leading: tuple[int, ...] = (2, 37)
    dtype: torch.dtype = torch.float32
    numerics: Numerics = "invariant"
    formula: RmsFormula = PLAIN

    def split(self, axis: Axis) -> Split:
        heads = Heads(*self.heads, 8, axis.size)
        held = heads.held(axis.rank) if self.of_keys else None
        cut = heads.key_cut if self.of_keys else heads.query_cut
        return Split(axis, cut, Scheme(numerics=self.numerics), "norm", held=held)

    @property
    def features(self) -> int:
        return self.heads[1 if self.of_keys else 0] * self.heads[2]

    def module(self) -> nn.RMSNorm:
        size = self.features if self.kind == "across" else self.heads[2]
        module = nn.RMSNorm(size, eps=1e-6, dtype=self.dtype)
        module.weight = parameter(size, seed=1, dtype=self.dtype)
        return module

    def data(self) -> tuple[Tensor, Tensor]:
        shape = (*self.leading, self.features)
        return normal(*shape, seed=2).to(self.dtype), normal(*shape, seed=3).to(self.dtype)

    def shaped(self, x: Tensor) -> Tensor:
        """(*, features) as the norm takes it."""
        if self.kind == "across":
            return x
        return x.view(*x.shape[:-1], x.shape[-1] // self.heads[2], self.heads[2])


SETUPS = [
    Setup(kind, heads, of_keys, leading)
    for kind in ("across", "heads")
    for of_keys in (False, True)
    for heads, leading in (
        ((6, 2, 5), (2, 37)),
        ((4, 1, 8), (3,)),
        ((8, 8, 16), (2, 1, 5)),
        ((16, 4, 7), (130,)),
        ((3, 3, 1), (2, 0)),
    )
]


def computed(axis: Axis, setup: Setup) -> Tensors:
    """What this rank holds of y and of the gradients, and the norm of all gradients."""
    split = setup.split(axis)
    kind = layers.ShardedRMSNorm if setup.kind == "across" else layers.HeadRMSNorm
    layer = kind.from_module(setup.module(), split)
    if setup.formula != layer.formula:
        layer.formula = setup.formula
    held = held_of(setup, axis)
    x, grad_y = (whole[..., held.start : held.stop].contiguous() for whole in setup.data())
    x.requires_grad_()
    before = x.detach().clone()
    y = layer(setup.shaped(x))
    y.backward(setup.shaped(grad_y))
    assert torch.equal(x, before)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return {
        "y": y.detach().reshape(x.shape),
        "x.grad": x.grad,
        "weight.grad": layer.weight.grad,
        "grad_norm": grad_norm(layer),
    }


def held_of(setup: Setup, axis: Axis) -> range:
    split = setup.split(axis)
    return split.cut.units(split.cut.run(axis.rank) if split.held is None else split.held)


def part_of(whole: Tensors, setup: Setup, axis: Axis) -> Tensors:
    """Of what degree 1 computes, what a rank should have."""
    held = held_of(setup, axis)
    parts = {name: whole[name][..., held.start : held.stop] for name in ("y", "x.grad")}
    weight = whole["weight.grad"]
    parts["weight.grad"] = weight[held.start : held.stop] if setup.kind == "across" else weight
    return {**parts, "grad_norm": whole["grad_norm"]}


def of_torch(setup: Setup) -> Tensors:
    module, (x, grad_y) = setup.module(), setup.data()
    x.requires_grad_()
    y = module(setup.shaped(x))
    y.backward(setup.shaped(grad_y))
    assert x.grad is not None
    grad = module.weight.grad
    assert grad is not None
    return {
        "y": y.detach().reshape(x.shape),
        "x.grad": x.grad,
        "weight.grad": grad,
        "grad_norm": grad.double().norm().to(torch.promote_types(grad.dtype, torch.float32)),
    }


def check_against_torch(axis: Axis, setups: list[Setup]) -> None:
    for setup in setups:
        found, wanted = computed(axis, setup), part_of(of_torch(setup), setup, axis)
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            tolerance = {k: 10 * v for k, v in TOLERANCE[setup.dtype].items()}
            assert_close(
                found[name], value, **tolerance, msg=lambda m, s=setup, n=name: f"{s} {n}: {m}"
            )


@EVERYWHERE
@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_cut_norms_are_torchs(pool: Pool, degree: int, engine: str, numerics: Numerics) -> None:
    setups = [
        replace(setup, numerics=numerics, dtype=dtype)
        for setup in SETUPS
        for dtype in (torch.float64, torch.float32)
    ]
    pool(degree, engine).run(functools.partial(check_against_torch, setups=setups))


@pytest.mark.parametrize("degree", [1, 3])
def test_cut_norms_are_torchs_in_bf16(pool: Pool, degree: int) -> None:
    setups = [replace(setup, dtype=torch.bfloat16) for setup in SETUPS]
    pool(degree, "threads").run(functools.partial(check_against_torch, setups=setups))


def computed_all(axis: Axis, setups: list[Setup], seed: int) -> list[Tensors]:
    """Under a schedule of 1 and 2 threads that differs from rank to rank."""
    found = []
    for number, setup in enumerate(setups):
        with random_threads(1000 * seed + 10 * number + axis.rank):
            found.append(computed(axis, setup))
    return found


PLACES = [(1, "threads"), (3, "threads"), (8, "threads"), (3, "processes")]


def differing(pool: Pool, setups: list[Setup], places: list[tuple[int, str]] = PLACES) -> list[str]:
    """Which tensors a rank has with other bits than degree 1."""
    alone = pool(1, "threads").run(lambda axis: computed_all(axis, setups, 0))[0]
    found = []
    for degree, engine in places:
        run = functools.partial(computed_all, setups=setups, seed=degree)
        for rank, results in enumerate(pool(degree, engine).run(run)):
            axis = Place(rank, degree)
            for setup, one, tensors in zip(setups, alone, results, strict=True):
                wanted = part_of(one, setup, axis)  # type: ignore[arg-type]
                found += [
                    f"{engine} {degree}, rank {rank}, {setup.kind}, keys={setup.of_keys}: {name}"
                    for name in wanted
                    if not bits_equal(tensors[name], wanted[name])
                ]
    return found


@dataclass(frozen=True)
class Place:
    """Enough of an axis to ask who holds what."""

    rank: int
    size: int


def test_cut_norms_have_the_same_bits_everywhere(pool: Pool) -> None:
    llama = RmsFormula(1e-6, rounds_before_weight=True)
    gemma = RmsFormula(1e-6, offset=1.0)
    setups = [
        *SETUPS,
        *(replace(s, dtype=torch.bfloat16, formula=llama) for s in SETUPS[::3]),
        *(replace(s, dtype=torch.float64, formula=gemma) for s in SETUPS[::3]),
    ]
    assert differing(pool, setups) == []


def test_native_has_other_bits(pool: Pool) -> None:
    """Negative control: these inputs can tell one order of additions from another."""
    setups = [replace(s, numerics="native") for s in SETUPS if s.heads == (16, 4, 7)]
    found = " ".join(differing(pool, setups, [(2, "threads"), (3, "threads")]))
    assert "across, keys=False: y" in found
    assert "heads, keys=False: weight.grad" in found


RIGHT_SUM = Split.sum_blocks


def sum_of_parts(
    self: Split, sums: Iterable[Tensor], *, like: Tensor, direction: str, **_: Any
) -> Tensor:
    """What each rank has, added up over the ranks; parameters are added up as ever."""
    if direction == "update":
        return RIGHT_SUM(self, sums, like=like, direction=direction, shape=())
    return comm.all_reduce(sum(sums).to(like.dtype), self.axis, direction=direction)


def test_planted_heads_counted_by_every_rank_that_holds_them(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key-value head is held by several ranks and owned by one."""
    setups = [Setup(kind, (8, 2, 5), True, (7,)) for kind in ("across", "heads")]
    assert differing(pool, setups, [(4, "threads")]) == []

    def held(self: Split) -> tuple[slice, ...]:
        return (slice(0, len(self.held_indices)),)

    monkeypatch.setattr(Split, "blocks", property(held))
    monkeypatch.setattr(Split, "sum_blocks", sum_of_parts)
    found = " ".join(differing(pool, setups, [(4, "threads")]))
    assert "across, keys=True: y" in found
    assert "heads, keys=True: weight.grad" in found
    assert "heads, keys=True: grad_norm" in found


def test_planted_weight_gradient_of_heads_that_is_not_summed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def local(
        self: Split, sums: Iterable[Tensor], *, like: Tensor, direction: str, **_: Any
    ) -> Tensor:
        if direction == "update":
            return RIGHT_SUM(self, sums, like=like, direction=direction, shape=())
        return sum(sums).to(like.dtype)

    monkeypatch.setattr(Split, "sum_blocks", local)
    found = differing(pool, [Setup("heads", (8, 8, 16))], [(2, "threads")])
    assert any(each.endswith("weight.grad") for each in found)


def test_planted_norm_that_counts_a_replicated_gradient_once_per_rank(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setups = [Setup("heads", (8, 8, 16)), Setup("across", (8, 8, 16))]
    correct = gradient_norms.sum_squares_of

    def once_per_rank(grad: Tensor, place: layouts.ParameterLayout) -> Tensor:
        layout, axis, square = place.layout, place.axis, correct(grad, place)
        if layout.is_replicated and axis is not None:
            square = comm.all_reduce(square, axis, direction="update")
        return square

    monkeypatch.setattr(gradient_norms, "sum_squares_of", once_per_rank)
    found = differing(pool, setups, [(2, "threads")])
    assert found == [f"threads 2, rank {rank}, heads, keys=False: grad_norm" for rank in (0, 1)]


def test_squares_of_a_row_are_counted_over_all_ranks(pool: Pool) -> None:
    """Negative control: a norm of each rank's own part is far away."""
    setup = Setup("across", (8, 8, 16))

    def run(axis: Axis) -> tuple[float, float]:
        held = held_of(setup, axis)
        x = setup.data()[0][..., held.start : held.stop]
        wanted = part_of(of_torch(setup), setup, axis)["y"]
        weight = setup.module().weight.detach()[held.start : held.stop]
        own = rms_norm(x, weight, eps=1e-6)
        ours = sharded_rms_norm(x, weight, setup.split(axis), setup.formula)
        return (own - wanted).abs().max().item(), (ours - wanted).abs().max().item()

    for own, ours in pool(3, "threads").run(run):
        assert own > 0.1
        assert ours < 1e-5


def test_a_frozen_weight_is_not_summed_for_and_degree_1_sends_nothing(pool: Pool) -> None:
    def run(axis: Axis, is_frozen: bool) -> list[int]:
        axis.transport.ledger.reset()
        for setup in (Setup("across"), Setup("heads")):
            split, held = setup.split(axis), held_of(setup, axis)
            x = setup.shaped(setup.data()[0][..., held.start : held.stop]).requires_grad_()
            weight = torch.ones(len(held) if setup.kind == "across" else 5)
            norm = sharded_rms_norm if setup.kind == "across" else head_rms_norm
            norm(x, weight.requires_grad_(not is_frozen), split, setup.formula).sum().backward()
        count = axis.transport.ledger.calls
        return [count("forward", "all_reduce"), count("backward", "all_reduce")]

    for degree, is_frozen, wanted in (
        (3, False, [1, 2]),
        (3, True, [1, 1]),
        (1, False, [0, 0]),
    ):
        for found in pool(degree, "threads").run(functools.partial(run, is_frozen=is_frozen)):
            assert found == wanted


def test_ranks_without_heads_take_part(pool: Pool) -> None:
    for setup in (Setup("across", (3, 1, 4)), Setup("heads", (3, 1, 4), True)):
        assert differing(pool, [setup], [(8, "threads")]) == []
        for found in pool(8, "threads").run(lambda axis, s=setup: computed(axis, s))[3:]:
            assert found["y"].shape[-1] == 0


def test_what_does_not_fit_a_cut_norm_raises(pool: Pool) -> None:
    def run(axis: Axis) -> None:
        across, heads = Setup("across").split(axis), Setup("heads").split(axis)
        with pytest.raises(ShapeError, match=r"norm on .*\(2, 30\), but \(\*, held\) ends in"):
            sharded_rms_norm(torch.ones(2, 30), None, across, RmsFormula(1e-6))
        with pytest.raises(ShapeError, match=r"a weight of shape \(30,\), but this rank holds"):
            sharded_rms_norm(
                torch.ones(2, len(across.held_indices)), torch.ones(30), across, RmsFormula(1e-6)
            )
        with pytest.raises(ShapeError, match=r"\(\*, held heads, head_dim\) ends in"):
            head_rms_norm(torch.ones(2, 30), None, heads, RmsFormula(1e-6))
        with pytest.raises(ShapeError, match=r"a weight of shape \(4,\), but this rank holds \(5,"):
            head_rms_norm(
                torch.ones(2, len(heads.held_indices) // 5, 5),
                torch.ones(4),
                heads,
                RmsFormula(1e-6),
            )
        with pytest.raises(ShapeError, match="the cut is for degree 5 and the axis has 2 ranks"):
            Split(axis, Cut(30, 8, 5), Scheme(), "norm")

    pool(2, "threads").run(run)


# Modules.


def models_own() -> list[tuple[nn.Module, RmsFormula]]:
    def of(model: str) -> nn.Module:
        module = pytest.importorskip(
            f"transformers.models.{model.lower()}.modeling_{model.lower()}"
        )
        return getattr(module, f"{model}RMSNorm")(48, eps=1e-5)

    llamas = ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite")
    return [
        *((of(model), RmsFormula(1e-5, 0.0, True)) for model in llamas),
        (of("Gemma2"), RmsFormula(1e-5, 1.0, False)),
        (of("Olmo2"), RmsFormula(1e-5, 0.0, False)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_transformers_are_found_out_and_computed(dtype: torch.dtype) -> None:
    for module, formula in models_own():
        assert find_formula(module) == formula, module
        module.to(dtype).eval()
        replacement = invariant_replacement(module)
        assert type(replacement) is layers.RMSNorm
        assert replacement.weight is module.weight
        assert not replacement.training
        assert replacement.offset == formula.offset
        with torch.no_grad():
            module.weight.add_(0.3 * normal(48, seed=5).to(dtype))
        x, grad_y = normal(7, 3, 48).to(dtype), normal(7, 3, 48, seed=1).to(dtype)
        y, *grads = step(replacement, x, grad_y, module.weight)
        y_theirs, *theirs = step(module, x, grad_y, module.weight)
        assert_close(y, y_theirs, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
        for a, b in zip(grads, theirs, strict=True):
            assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 5e-2, atol=1e-1)
        if dtype == torch.bfloat16:  # all but where the sums' last bit moves a rounding
            assert (y != y_theirs).double().mean() < 0.01


def test_a_norm_that_computes_something_else_is_not_ours() -> None:
    class BaseRMSNorm(nn.Module):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))
            self.eps = eps

        def forward(self, x: Tensor) -> Tensor:
            return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight

    class HalvedRMSNorm(BaseRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    class GatedRMSNorm(BaseRMSNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * gate

    class SizedRMSNorm(BaseRMSNorm):
        def __init__(self, size: int, width: int) -> None:
            super().__init__(size)
            self.width = width

    class OtherNorm(BaseRMSNorm):
        pass

    class WideRMSNorm(BaseRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return rms_norm(x, self.weight, eps=self.eps)

    class OptionalRMSNorm(WideRMSNorm):
        def __init__(self, size: int, eps: float = 1e-6, scale: float = 1.0) -> None:
            super().__init__(size, eps)
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    class BiasedRMSNorm(WideRMSNorm):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__(size, eps)
            self.bias = nn.Parameter(torch.zeros(size))

    ours = [WideRMSNorm(5), OptionalRMSNorm(5), OptionalRMSNorm(8, 1e-3)]
    assert [find_formula(module) for module in ours] == [
        RmsFormula(1e-6), RmsFormula(1e-6), RmsFormula(1e-3)
    ]  # fmt: skip
    changed = WideRMSNorm(5)
    changed.forward = lambda x: x  # type: ignore[method-assign]
    not_ours = [
        BaseRMSNorm(5),  # rounds in bf16 as none of ours does
        HalvedRMSNorm(5),
        GatedRMSNorm(5),
        SizedRMSNorm(5, 3),
        OtherNorm(5),
        OptionalRMSNorm(5, scale=2.0),
        BiasedRMSNorm(5),
        changed,
        nn.Linear(3, 3),
    ]
    for module in not_ours:
        assert find_formula(module) is None, module
        assert invariant_replacement(module) is None
    with pytest.raises(UsageError, match="HalvedRMSNorm is no RMSNorm that we know"):
        layers.RMSNorm.from_module(HalvedRMSNorm(5))


@pytest.mark.parametrize(
    "module",
    [
        nn.RMSNorm(12),
        nn.RMSNorm(12, eps=1e-3),
        nn.RMSNorm(12, elementwise_affine=False),
        nn.LayerNorm(12),
        nn.LayerNorm(12, eps=1e-2, bias=False),
        nn.LayerNorm(12, elementwise_affine=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_replacements_of_torchs_norms_share_their_parameters(
    module: nn.Module, dtype: torch.dtype
) -> None:
    module.to(dtype)
    replacement = invariant_replacement(module)
    assert replacement is not None
    assert type(replacement).__module__ == layers.__name__
    assert list(map(id, replacement.parameters())) == list(map(id, module.parameters()))
    x, grad_y = normal(9, 12).to(dtype), normal(9, 12, seed=1).to(dtype)
    weights = list(module.parameters())
    for a, b in zip(
        step(replacement, x, grad_y, *weights), step(module, x, grad_y, *weights), strict=True
    ):
        assert_close(a, b, **TOLERANCE[dtype])
    assert set(replacement.state_dict()) == set(module.state_dict())


def test_what_has_no_replacement() -> None:
    for module in (
        nn.RMSNorm((3, 4)),
        nn.LayerNorm((3, 4)),
        type("MyLayerNorm", (nn.LayerNorm,), {})(4),
        layers.RMSNorm(4, RmsFormula(1e-6)),
    ):
        assert invariant_replacement(module) is None
    with pytest.raises(UsageError, match=r"LayerNorm.from_module takes an nn.LayerNorm over one"):
        layers.LayerNorm.from_module(nn.LayerNorm((3, 4)))


def test_modules_begin_as_they_should_and_say_what_they_are() -> None:
    axis = Axis.solo()
    split = Split(axis, Heads(4, 2, 8, 8, 1).query_cut, Scheme(), "q_norm")
    gemma = RmsFormula(1e-6, offset=1.0)
    across, heads = layers.ShardedRMSNorm(gemma, split), layers.HeadRMSNorm(gemma, split)
    for module in (layers.RMSNorm(32, gemma), across, heads):
        assert torch.equal(module.weight, torch.zeros_like(module.weight))
        assert "offset=1.0" in repr(module)
    assert across.weight.shape == (32,)
    assert heads.weight.shape == (8,)
    assert "32, unit=8, " in repr(across)
    assert across.name == "q_norm"
    plain = layers.LayerNorm(3)
    assert repr(plain) == "LayerNorm(3, eps=1e-05, bias=True)"
    assert bits_equal(plain(torch.tensor([[1.0, 2.0, 3.0]])), layer_norm(
        torch.tensor([[1.0, 2.0, 3.0]]), None, None
    ))  # fmt: skip
    unnamed = Split(axis, Cut(8, 8, 1), Scheme())
    assert layers.ShardedRMSNorm(gemma, unnamed).name.startswith("ShardedRMSNorm")


def test_cut_modules_take_over_what_they_are_made_from(pool: Pool) -> None:
    def run(axis: Axis) -> None:
        setup = Setup("heads", dtype=torch.float64)
        module = setup.module().eval()
        layer = layers.HeadRMSNorm.from_module(module, setup.split(axis))
        assert layer.weight is module.weight
        assert not layer.training
        setup = Setup("across", (6, 2, 5), True)
        module = setup.module()
        module.weight.requires_grad_(False)
        cut = layers.ShardedRMSNorm.from_module(module, setup.split(axis))
        held = held_of(setup, axis)
        assert torch.equal(cut.weight, module.weight[held.start : held.stop])
        assert not cut.weight.requires_grad
        with pytest.raises(ShapeError, match=r"norm on .*, wants \(30,\)"):
            layers.ShardedRMSNorm.from_module(module, Setup("across").split(axis))
        with pytest.raises(ShapeError, match=r"norm on .*, wants \(5,\)"):
            layers.HeadRMSNorm.from_module(module, Setup("heads").split(axis))
        bare = nn.RMSNorm(5, elementwise_affine=False)
        with pytest.raises(UsageError, match="has no weight, which a norm that is cut needs"):
            layers.HeadRMSNorm.from_module(bare, Setup("heads").split(axis))
        with pytest.raises(UsageError, match="Linear is no RMSNorm that we know"):
            layers.HeadRMSNorm.from_module(nn.Linear(5, 5), Setup("heads").split(axis))

    pool(3, "threads").run(run)


def test_a_cut_norm_keeps_its_state(pool: Pool) -> None:
    def run(axis: Axis) -> None:
        setup = Setup("across", (6, 2, 5), True)
        layer = layers.ShardedRMSNorm.from_module(setup.module(), setup.split(axis))
        other = layers.ShardedRMSNorm(layer.formula, setup.split(axis))
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.weight, layer.weight)

    pool(3, "threads").run(run)


def test_nothing_is_left_of_the_order_of_leaves() -> None:
    """The sum over a cut dim is the tree over its leaves, at degree 1 too."""
    setup = Setup("across", (8, 8, 16))
    split, x = setup.split(Axis.solo()), setup.data()[0].view(-1, 128)
    leaves = [sum_squares_rows(x[:, 16 * i : 16 * i + 16].t()) for i in range(8)]
    pairs = [leaves[i] + leaves[i + 1] for i in range(0, 8, 2)]
    wanted = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
    assert bits_equal(cut_norms._AcrossRanks(split).squares(x), wanted)
