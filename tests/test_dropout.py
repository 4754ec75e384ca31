"""Dropout by position: the same mask at every degree, on every rank that holds the same."""

import functools
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from invariance import bits_equal, normal, random_threads, strided, threads
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import LayoutError, ShapeError, UsageError
from shardproof.heads import Heads
from shardproof.layers import dropout as layers
from shardproof.layers.dropout import Dropout, dropout_replacement, replay_dropout
from shardproof.leaves import Cut
from shardproof.ops import dropout as functional
from shardproof.ops.dropout import MaskKey, dropout

KEY = MaskKey(seed=0, name="h.0.dropout", step=0)


def test_kept_elements_are_scaled_and_the_others_are_zero() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = (1 + normal(300, 70).abs()).to(dtype)
        y = dropout(x, 0.3, KEY)
        assert y.dtype == dtype
        is_kept = y != 0
        assert is_kept.double().mean().item() == pytest.approx(0.7, abs=0.02)
        assert bits_equal(y[is_kept], (x * (1 / (1 - 0.3)))[is_kept])
        assert y.double().mean().item() == pytest.approx(x.double().mean().item(), rel=0.02)


def test_ends_of_p() -> None:
    x = normal(5, 3).requires_grad_()
    assert dropout(x, 0.0, KEY) is x
    y = dropout(x, 1.0, KEY)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()


def test_gradient_has_the_same_mask_and_scale() -> None:
    x, grad_y = normal(40, 30).requires_grad_(), normal(40, 30, seed=1)
    y = dropout(x, 0.25, KEY)
    y.backward(grad_y)
    assert x.grad is not None
    factor = torch.where(y == 0, 0.0, 1 / 0.75)
    assert bits_equal(x.grad.abs(), (grad_y * factor).abs())
    double = normal(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.5, KEY), double)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.5, KEY), double)


def test_seed_name_and_step_each_change_the_mask_and_nothing_else_does() -> None:
    x = torch.ones(64)
    keys = [MaskKey(0, "a", 0), MaskKey(1, "a", 0), MaskKey(0, "b", 0), MaskKey(0, "a", 1)]
    masks = {tuple(dropout(x, 0.5, key).tolist()) for key in keys}
    assert len(masks) == 4
    state = torch.get_rng_state()
    wanted = dropout(x, 0.5, KEY)
    for seed in (1, 2):
        with random_threads(seed):
            assert bits_equal(dropout(x, 0.5, KEY), wanted)
            assert bits_equal(dropout(strided(x), 0.5, KEY), wanted)
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_and_strides_have_no_say() -> None:
    x, grad_y = normal(701, 130), normal(701, 130, seed=1)

    def run(x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = dropout(x, 0.1, KEY)
        y.backward(grad_y)
        assert x.grad is not None
        return y.detach(), x.grad

    with threads(1):
        wanted = run(x, grad_y)
    for count in (1, 2):
        with threads(count):
            for same in (lambda t: t, strided, lambda t: t.t().contiguous().t()):
                assert all(map(bits_equal, run(same(x), same(grad_y)), wanted))


def test_numbers_stay_what_they_are() -> None:
    """A change of the key or of the draw alters the bits of every model: raise the scheme."""
    y = dropout(torch.ones(24), 0.3, MaskKey(seed=0, name="x", step=7))
    kept = (y != 0).int().tolist()
    assert kept == [1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1]


def test_input_is_unchanged_and_other_tensors_are_refused() -> None:
    x = normal(4, 5)
    before = x.clone()
    dropout(x, 0.5, KEY).zero_()
    assert bits_equal(x, before)
    assert dropout(torch.ones(2, 3, device="meta"), 0.5, KEY).is_meta
    for leaves in ([], [(0, slice(0, 3))], [(0, slice(0, 2)), (1, slice(3, 5))]):
        with pytest.raises(ShapeError, match=r"dim -1 of shape \(4, 5\) has 5 units, and the leav"):
            dropout(x, 0.5, KEY, leaves=leaves)
    with pytest.raises(ShapeError, match="dim 2 wanted of a tensor of shape"):
        dropout(x, 0.5, KEY, dim=2, leaves=[(0, slice(0, 5))])
    with pytest.raises(UsageError, match=r"h.0.dropout: p=1.5 is no probability"):
        dropout(x, 1.5, KEY)
    with pytest.raises(UsageError, match=r"takes a floating-point tensor, got torch.int64"):
        dropout(torch.arange(3), 0.5, KEY)


# On ranks.


def whole(axis: Axis) -> Tensor:
    """Three masks of an activation that every rank holds."""
    layer = Dropout(0.2, name="whole", seed=3)
    with random_threads(axis.rank):
        return torch.stack([layer(torch.ones(50, 31)) for _ in range(3)])


def cut(axis: Axis, dim: int = 1) -> Tensor:
    """Masks of one that is cut, put together from all ranks, and gradients beside them."""
    cut = Cut(61, 8, axis.size)
    layer = Dropout(0.2, name="cut", seed=3, axis=axis, cut=cut, dim=dim)
    shape = [7, 9, 5]
    shape[dim] = len(cut.owned(axis.rank))
    found = []
    for _ in range(2):
        x = torch.ones(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert x.grad is not None
        for part in (y.detach(), x.grad):
            found.append(comm.all_gather(part, axis, dim=dim, cut=cut, direction="prover"))
    return torch.stack(found)


def held(axis: Axis) -> Tensor:
    """The mask of what this rank holds of key-value heads, as features of all."""
    heads = Heads(8, 2, 4, 8, axis.size)
    own = heads.held(axis.rank)
    layer = Dropout(0.5, name="k", seed=0, axis=axis, cut=heads.key_cut, held=own, dim=-1)
    found = torch.full((11, 8), torch.nan)
    found[:, 4 * own.start : 4 * own.stop] = layer(torch.ones(11, 4 * len(own)))
    return found


PLACES = [(1, "threads"), (3, "threads"), (8, "threads"), (3, "processes")]


@pytest.mark.parametrize(
    "run", [whole, cut, functools.partial(cut, dim=0), functools.partial(cut, dim=-1)]
)
def test_every_degree_and_every_rank_has_the_same_mask(pool: Pool, run: Any) -> None:
    alone = pool(1, "threads").run(run)[0]
    assert 0.7 < (alone != 0).double().mean() < 0.9
    assert not torch.equal(alone[0], alone[-1])
    for degree, engine in PLACES:
        for rank, found in enumerate(pool(degree, engine).run(run)):
            assert bits_equal(found, alone), f"{engine} {degree}, rank {rank}"


def test_every_leaf_has_a_mask_of_its_own() -> None:
    x, leaves = torch.ones(20, 32), [(leaf, slice(8 * leaf, 8 * leaf + 8)) for leaf in range(4)]
    parts = dropout(x, 0.5, KEY, leaves=leaves).split(8, dim=1)
    assert len({tuple(part.flatten().tolist()) for part in parts}) == 4
    later = dropout(x[:, :8], 0.5, KEY, leaves=[(2, slice(0, 8))])
    assert torch.equal(later, parts[2])


def test_what_several_ranks_hold_has_one_mask(pool: Pool) -> None:
    alone = pool(1, "threads").run(held)[0]
    for degree in (2, 3, 8):
        for found in pool(degree, "threads").run(held):
            is_held = ~found.isnan()
            assert is_held.any()
            assert torch.equal(found[is_held], alone[is_held])


def test_planted_masks_drawn_by_rank(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's dropout does with a seed for each rank, and with one seed for all shards."""
    alone = {run: pool(1, "threads").run(run)[0] for run in (whole, cut)}
    draw, leaves_of = functional.draw_mask, layers._leaves

    def leaves_from_zero(*args: Any) -> Any:
        return tuple((number, at) for number, (_, at) in enumerate(leaves_of(*args)))

    def run_by_rank(axis: Axis) -> Tensor:
        ranks.value = axis.rank
        return whole(axis)

    def draw_by_rank(*args: Any, **named: Any) -> Tensor:
        return draw(*args, **{**named, "seed": named["seed"] + ranks.value})

    ranks = threading.local()
    monkeypatch.setattr(functional, "draw_mask", draw_by_rank)
    found = pool(2, "threads").run(run_by_rank)
    assert bits_equal(found[0], alone[whole])
    assert not bits_equal(found[1], alone[whole])
    monkeypatch.setattr(functional, "draw_mask", draw)
    monkeypatch.setattr(layers, "_leaves", leaves_from_zero)
    for found in pool(2, "threads").run(cut):
        assert bits_equal(found[0, :, :31], alone[cut][0, :, :31])
        assert not bits_equal(found, alone[cut])


# The module.


def test_every_call_in_training_draws_anew_and_the_step_can_be_set() -> None:
    layer, x = Dropout(0.5, name="a", seed=0), torch.ones(64)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    assert layer.step == 2
    assert layer.eval()(x) is x
    assert layer.step == 2
    layer.train().step = 0
    assert torch.equal(layer(x), first)
    layer.p = 0.0
    assert layer(x) is x
    assert layer.step == 1
    assert repr(layer) == "Dropout(p=0.0, name='a', seed=0)"
    for wrong in (-1, 1.5, "2", True):
        with pytest.raises(UsageError, match=r"'a': step=.* is no count of draws"):
            layer.step = wrong  # type: ignore[assignment]


def test_step_is_part_of_the_state() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Dropout(0.5, name="1", seed=0))
    x = torch.ones(4, 3)
    model(x), model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    wanted = model[1](x)
    file.seek(0)
    other = nn.Sequential(nn.Linear(3, 3), Dropout(0.5, name="1", seed=0))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other[1].step == 2
    assert torch.equal(other[1](x), wanted)
    with pytest.raises(LayoutError, match=r"cannot load \{\} into '1' \(Dropout\): it has no step"):
        other[1].set_extra_state({})


def test_a_replacement_is_for_plain_dropout_alone() -> None:
    replacement = dropout_replacement(nn.Dropout(0.3).eval(), name="h.0.drop", seed=5)
    assert repr(replacement) == "Dropout(p=0.3, name='h.0.drop', seed=5)"
    assert replacement is not None
    assert not replacement.training
    part = dropout_replacement(
        nn.Dropout(), name="a", seed=0, axis=Axis.solo(), cut=Cut(9, 8, 1), dim=0
    )
    assert repr(part) == "Dropout(p=0.5, name='a', seed=0, dim=0, leaves=8)"
    others: list[nn.Module] = [nn.Dropout(inplace=True), nn.Dropout2d(), nn.AlphaDropout()]
    others += [type("MyDropout", (nn.Dropout,), {})(), nn.Identity()]
    for module in others:
        assert dropout_replacement(module, name="a", seed=0) is None


def test_wrong_options_raise() -> None:
    with pytest.raises(UsageError, match=r"dropout 'a': p=-0.1 is no probability"):
        Dropout(-0.1, name="a", seed=0)
    with pytest.raises(UsageError, match="dropout 'a': cut is given without axis"):
        Dropout(0.1, name="a", seed=0, cut=Cut(8, 8, 1))
    with pytest.raises(UsageError, match="dropout 'a': axis is given without cut"):
        Dropout(0.1, name="a", seed=0, axis=Axis.solo())
    with pytest.raises(ShapeError, match=r"dropout 'a' on .*: the cut is for degree 2"):
        Dropout(0.1, name="a", seed=0, axis=Axis.solo(), cut=Cut(8, 8, 2))


# Activation checkpointing.


class Block(nn.Module):
    """Two dropouts, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Dropout(0.5, name="first", seed=0)
        self.second = Dropout(0.5, name="second", seed=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.first((self.second(self.first(x).square()) + 1).square())


def train(block: Block, call: Any) -> list[Tensor]:
    """Three calls in one graph, and the next mask."""
    x = (1 + normal(8, 5).square()).requires_grad_()
    y = x
    for _ in range(3):
        y = call(block, y.sqrt())
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return [y.detach(), x.grad, block(torch.ones(8, 5)), torch.tensor(block.first.step)]


def test_checkpointing_replays_the_masks() -> None:
    wanted = train(Block(), lambda block, x: block(x))

    def call(block: Block, x: Tensor) -> Any:
        context_fn = replay_dropout(block)
        return checkpoint(block, x, use_reentrant=False, context_fn=context_fn)

    assert all(map(bits_equal, train(Block(), call), wanted))

    def nested(block: Block, x: Tensor) -> Any:
        context_fn = replay_dropout(block)
        return checkpoint(call, block, x, use_reentrant=False, context_fn=context_fn)

    assert all(map(bits_equal, train(Block(), nested), wanted))


def test_checkpointing_replays_the_masks_in_each_of_two_backwards() -> None:
    block, x = Block(), (1 + normal(8, 5).square()).requires_grad_()
    y = checkpoint(block, x, use_reentrant=False, context_fn=replay_dropout(block))
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert bits_equal(first, second)
    assert block.first.step == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_without_it_raises(use_reentrant: bool) -> None:
    block, x = Block(), torch.ones(8, 5, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=use_reentrant)
    with pytest.raises(
        UsageError, match=r"'first' \(Dropout\) is called during backward.*its 2 dr"
    ):
        y.sum().backward()
    block.first.p = block.second.p = 0.0
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    block.first.p = 0.5
    checkpoint(block.eval(), x, use_reentrant=use_reentrant).sum().backward()
