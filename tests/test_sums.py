"""Sums by a halving fold: an order that depends on the shape alone."""

import random
import re

import pytest
import torch

from invariance import (
    LargestNew,
    bits_equal,
    misaligned,
    normal,
    random_cut,
    random_threads,
    strided,
)
from shardproof.errors import ShapeError
from shardproof.numerics.sums import sum_all, sum_rows, sum_squares, sum_squares_rows

ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 33, 100, 257]


def fold(values: list[float]) -> float:
    """The definition, one number at a time."""
    while len(values) > 1:
        power = 1
        while 2 * power < len(values):
            power *= 2
        head, tail = values[:power], values[power:]
        values = [a + (tail[i] if i < len(tail) else 0.0) for i, a in enumerate(head)]
    return values[0] if values else 0.0


@pytest.mark.parametrize("rows", ROWS)
def test_order_of_additions_is_the_fold(rows: int) -> None:
    x = normal(rows, 3).double().exp() ** 4  # of very different sizes
    expected = [fold(x[:, column].tolist()) for column in range(3)]
    assert sum_rows(x).tolist() == expected
    assert [sum_all(x[:, column]).item() for column in range(3)] == expected
    squares = [fold([v * v for v in x[:, column].tolist()]) for column in range(3)]
    assert [sum_squares(x[:, column]).item() for column in range(3)] == squares
    assert sum_squares_rows(x).tolist() == squares


def test_another_order_has_other_bits() -> None:
    """Negative control: these numbers can tell one order from another."""
    x = normal(257, 1).double().exp() ** 4
    assert sum(x[:, 0].tolist()) != fold(x[:, 0].tolist())


@pytest.mark.parametrize("shape", [(1, 509), (2, 7), (37, 509), (129, 1001), (40_001, 3), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_do_not_depend_on_cut_layout_or_threads(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rng = random.Random(0)
    x = normal(*shape).to(dtype)
    rows, total, squares = sum_rows(x), sum_all(x), sum_squares(x)
    row_squares = sum_squares_rows(x)
    layouts = [strided(x), misaligned(x, 1), misaligned(x, 9), x.t().contiguous().t()]
    for seed, same in enumerate(layouts):
        with random_threads(seed):
            assert bits_equal(sum_rows(same), rows)
            assert bits_equal(sum_all(same), total)
            assert bits_equal(sum_squares(same), squares)
            assert bits_equal(sum_squares_rows(same), row_squares)
            for cut in (random_cut(shape[1], rng), [slice(0, 1)]):
                for s in cut:
                    assert bits_equal(sum_rows(same[:, s]), rows[s])
                    assert bits_equal(sum_rows(same[:, s].contiguous()), rows[s])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    x = normal(1000, 5).to(dtype)
    wide = sum_rows(x.float())
    assert bits_equal(sum_rows(x), wide.to(dtype))
    assert bits_equal(sum_rows(x, dtype=torch.float32), wide)
    assert bits_equal(sum_all(x, dtype=torch.float32), sum_all(x.float()))
    assert bits_equal(sum_squares(x), sum_squares(x.float()))
    assert sum_squares(x).dtype == torch.float32
    assert not bits_equal(sum_rows(x, dtype=torch.float32), wide.to(dtype).float())


def test_a_wider_result_is_accumulated_wide() -> None:
    x = normal(1000, 5)
    assert bits_equal(sum_rows(x, dtype=torch.float64), sum_rows(x.double()))
    assert not bits_equal(sum_rows(x, dtype=torch.float64), sum_rows(x).double())


def test_zeros_and_special_values_travel_as_in_additions() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[-0.0, -0.0, inf, inf, nan], [-0.0, 0.0, 1.0, -inf, 1.0]])
    y = sum_rows(x)
    assert y[:3].tolist() == [0.0, 0.0, inf]
    assert torch.signbit(y[:2]).tolist() == [True, False]
    assert torch.isnan(y[3:]).all()
    assert torch.signbit(sum_rows(torch.full((1, 1), -0.0))).all()
    assert bits_equal(sum_rows(torch.ones(0, 4)), torch.zeros(4))
    assert sum_rows(torch.ones(4, 0)).shape == (0,)
    assert sum_all(torch.ones(())).item() == 1.0


def test_it_is_more_accurate_than_adding_one_after_the_other() -> None:
    x = normal(65_536, 4).abs()
    exact = x.double().sum(0)
    in_turn = torch.zeros(4)
    for block in x.split(1):
        in_turn += block[0]
    assert (sum_rows(x) - exact).abs().max() < 0.1 * (in_turn - exact).abs().max()


def test_input_is_unchanged_and_no_result_shares_its_memory() -> None:
    for rows in (1, 2, 3, 5, 8):
        x = normal(rows, 3)
        before = x.clone()
        y = sum_rows(x)
        y.zero_()
        sum_all(x).zero_()
        sum_squares(x).zero_()
        assert bits_equal(x, before)
        assert y.untyped_storage().nbytes() == 3 * 4  # and it keeps no buffer alive


@pytest.mark.parametrize("rows", [2, 3, 5, 8, 9, 127, 128])
def test_buffers_have_at_most_half_of_the_rows(rows: int) -> None:
    x = normal(rows, 4)
    for f in (sum_rows, sum_all, sum_squares):
        with LargestNew(x) as largest:
            f(x)
        half = -(-rows // 2) * 16
        assert 0 < largest.bytes <= (half if f is sum_rows else max(half, rows * 8))
    with LargestNew(x) as largest:  # negative control: the audit sees a copy of the input
        x.clone()
    assert largest.bytes == rows * 16


def test_gradients_of_first_and_second_order() -> None:
    x = normal(5, 3).double().requires_grad_()
    for f in (sum_rows, sum_all, sum_squares, sum_squares_rows):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)
    narrow = normal(5, 3).bfloat16().requires_grad_()
    sum_squares(narrow).backward()
    assert narrow.grad is not None
    assert bits_equal(narrow.grad, 2 * narrow.detach())


def test_a_tensor_that_is_no_matrix_raises() -> None:
    with pytest.raises(ShapeError, match=re.escape("got shape (2, 3, 4)")):
        sum_rows(torch.ones(2, 3, 4))
    with pytest.raises(ShapeError, match=re.escape("sum_squares_rows takes a matrix (M, N), got")):
        sum_squares_rows(torch.ones(4))
