"""Draws by position: the same numbers at every degree, and nobody else's generator touched."""

import itertools
import re

import numpy as np
import pytest
import torch

from invariance import bits_equal, threads
from shardproof.errors import UsageError
from shardproof.leaves import Cut
from shardproof.numerics.random import draw, draw_mask, draw_normal, draw_uniform, generator


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [63, 8, 5])
def test_every_degree_draws_the_same_tensor(degree: int, size: int) -> None:
    def leaf(index: int, rows: int) -> torch.Tensor:
        return draw_uniform((rows, 11), -0.3, 0.3, seed=1, name="up.weight", leaf=index)

    whole = Cut(size, leaves=8, degree=1)
    expected = torch.cat([leaf(i, len(whole.leaf(i))) for i in range(whole.num_leaves)])
    assert expected.shape == (size, 11)

    cut = Cut(size, leaves=8, degree=degree)
    shards = []
    for rank in range(degree):
        shard = torch.full((cut.sizes()[rank], 11), float("nan"))
        for i, where in zip(cut.run(rank), cut.leaf_slices(rank), strict=True):
            shard[where] = leaf(i, where.stop - where.start)
        shards.append(shard)
    assert bits_equal(torch.cat(shards), expected)


def test_seed_name_and_leaf_each_change_the_numbers() -> None:
    keys = itertools.product((0, 1), ("a", "b", "1:a", ""), (0, 1, 11))
    draws = [
        tuple(draw_normal((20,), 0.0, 1.0, seed=seed, name=name, leaf=leaf).tolist())
        for seed, name, leaf in keys
    ]
    assert len(set(draws)) == len(draws) == 24


def test_numbers_stay_what_they_are() -> None:
    """A change of the key or of the draw alters the bits of every model: raise the scheme."""
    own = generator(seed=0, name="up.weight", leaf=3)
    key = own.bit_generator.state["state"]["key"]  # all 128 bits of it
    assert key.tolist() == [17353380855965445064, 3796112684713709321]
    values = draw_uniform((3,), -1.0, 1.0, seed=0, name="up.weight", leaf=3)
    assert values.tolist() == pytest.approx([-0.2763561, 0.2408085, -0.6392872], abs=1e-6)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw_uniform((100,), 0.0, 1.0, seed=0, name="x")
    draw_normal((100,), 0.0, 1.0, seed=0, name="x")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # negative control: a draw from it would be seen
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_global_seed_has_no_say() -> None:
    draws = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            draws.append(draw_normal((50,), 0.0, 1.0, seed=0, name="x"))
    assert bits_equal(*draws)


@pytest.mark.parametrize("size", [1, 7, 15, 16, 17, 1000, 100_001])
def test_threads_have_no_say(size: int) -> None:
    for f in (draw_uniform, draw_normal):
        draws = []
        for count in (1, 2):
            with threads(count):
                draws.append(f((size,), 0.0, 1.0, seed=0, name="x"))
        assert bits_equal(*draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_from_fp32(dtype: torch.dtype) -> None:
    for f in (draw_uniform, draw_normal):
        wide = f((4, 25), 0.0, 1.0, seed=0, name="x", dtype=torch.float32)
        narrow = f((4, 25), 0.0, 1.0, seed=0, name="x", dtype=dtype)
        assert bits_equal(narrow, wide.to(dtype))
    double = draw_uniform((100,), 0.0, 1.0, seed=0, name="x", dtype=torch.float64)
    assert not bits_equal(double, double.float().double())


def test_dtype_and_device_are_as_asked() -> None:
    assert draw_uniform((2,), 0.0, 1.0, seed=0, name="x").dtype == torch.get_default_dtype()
    on_meta = draw_uniform((2, 3), 0.0, 1.0, seed=0, name="x", device="meta")
    assert on_meta.is_meta
    assert on_meta.shape == (2, 3)
    with torch.device("meta"):
        assert draw_normal((2,), 0.0, 1.0, seed=0, name="x").is_meta
        assert draw_normal((2,), 0.0, 1.0, seed=0, name="x", device="cpu").device.type == "cpu"
    assert draw_uniform((0, 3), 0.0, 1.0, seed=0, name="x").shape == (0, 3)


def test_distributions_are_what_they_say() -> None:
    uniform = draw_uniform((100_000,), -2.0, 3.0, seed=0, name="u")
    assert -2.0 <= uniform.min() < -1.999
    assert 2.999 < uniform.max() <= 3.0
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    normal = draw_normal((100_000,), 1.0, 2.0, seed=0, name="n")
    assert normal.mean().item() == pytest.approx(1.0, abs=0.03)
    assert normal.std().item() == pytest.approx(2.0, abs=0.03)


def test_draw_takes_any_fill() -> None:
    mask = draw(
        (1000,), lambda out, own: np.less(own.random(1000), 0.25, out=out), seed=0, name="mask"
    )
    assert set(mask.tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.25, abs=0.05)
    assert not mask.requires_grad


@pytest.mark.parametrize("p", [0.0, 1e-6, 2**-16, 0.1, 0.37, 0.999, 1 - 2**-16, 1.0])
def test_a_mask_keeps_as_many_as_it_should(p: float) -> None:
    count = 3_000_001  # several blocks, and an odd end
    mask = draw_mask((count,), p, seed=0, name="m", step=0)
    assert mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) <= {0, 1}
    spread = 5 * (p * (1 - p) / count) ** 0.5
    assert 1 - mask.double().mean().item() == pytest.approx(p, abs=spread)


def test_blocks_of_a_mask_are_drawn_one_after_the_other() -> None:
    """So that what torch does not see is small; and no block repeats another."""
    long = draw_mask((1 << 17,), 0.5, seed=0, name="m", step=0)
    short = draw_mask((1 << 16,), 0.5, seed=0, name="m", step=0)
    assert torch.equal(long[: 1 << 16], short)
    assert not torch.equal(long[1 << 16 :], short)
    shaped = draw_mask((2, 1 << 16), 0.5, seed=0, name="m", step=0)
    assert torch.equal(shaped.view(-1), long)


def test_what_16_bits_leave_open_is_drawn_further() -> None:
    """Negative control: at this p the 16 bits alone would drop nothing."""
    mask = draw_mask((1 << 20,), 2.0**-17, seed=0, name="m", step=0)
    assert 1 <= (1 - mask.long()).sum() <= 30


def test_masks_have_a_step_and_keys_of_their_own() -> None:
    keys = itertools.product((0, 1), ("a", "1:a", ""), (0, 1, 11), (0, 1))
    masks = {
        tuple(draw_mask((40,), 0.5, seed=seed, name=name, leaf=leaf, step=step).tolist())
        for seed, name, leaf, step in keys
    }
    assert len(masks) == 36
    with_step = generator(seed=0, name="a", step=0).bit_generator.state["state"]["key"]
    without = generator(seed=0, name="a").bit_generator.state["state"]["key"]
    assert with_step.tolist() != without.tolist()
    assert with_step.tolist() == [12338377511760048641, 17805653959554660824]


def test_masks_of_no_probability_and_no_step_raise() -> None:
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=f"cannot draw a mask for 'm' with p={p}. Use 0 to 1"):
            draw_mask((2,), p, seed=0, name="m", step=0)
    with pytest.raises(UsageError, match="cannot draw 'm' for step -1: steps count from 0"):
        draw_mask((2,), 0.5, seed=0, name="m", step=-1)
    assert draw_mask((2, 3), 0.5, seed=0, name="m", step=0, device="meta").is_meta
    assert draw_mask((), 1.0, seed=0, name="m", step=0).item() == 0
    assert draw_mask((0, 3), 0.5, seed=0, name="m", step=0).shape == (0, 3)


def test_wrong_leaf_and_wrong_dtype_raise() -> None:
    with pytest.raises(UsageError, match=re.escape("leaf -1 of 'up.weight'")):
        generator(seed=0, name="up.weight", leaf=-1)
    with pytest.raises(UsageError, match=re.escape("'ids' as torch.int64")):
        draw_uniform((2,), 0.0, 1.0, seed=0, name="ids", dtype=torch.int64)
