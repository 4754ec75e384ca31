"""Draws by position: the same numbers at every degree, and nobody else's generator touched."""

import itertools
import re

import numpy as np
import pytest
import torch

from invariance import bits_equal, threads
from shardproof.errors import UsageError
from shardproof.leaves import Cut
from shardproof.numerics.random import draw, draw_normal, draw_uniform, generator


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


def test_wrong_leaf_and_wrong_dtype_raise() -> None:
    with pytest.raises(UsageError, match=re.escape("leaf -1 of 'up.weight'")):
        generator(seed=0, name="up.weight", leaf=-1)
    with pytest.raises(UsageError, match=re.escape("'ids' as torch.int64")):
        draw_uniform((2,), 0.0, 1.0, seed=0, name="ids", dtype=torch.int64)
