"""Losses: the same bits at every degree, torch's values, and gradients written out."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from invariance import (
    LargestNew,
    all_bits_equal,
    bits_equal,
    misaligned,
    normal,
    random_threads,
    strided,
)
from shardproof.axis import Axis
from shardproof.comm import differentiable as collectives
from shardproof.errors import ShapeError, UsageError
from shardproof.leaves import Cut
from shardproof.numerics.sums import sum_squares
from shardproof.ops.losses import cross_entropy, mse_loss
from shardproof.ranks import launch


def with_gradients(loss: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward(torch.full_like(value, 0.7))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def sharded_mse(y: Tensor, target: Tensor, degree: int) -> list[Tensor]:
    """The loss of rank 0 and the whole gradients; all ranks must have the same loss."""

    def work(axis: Axis) -> list[Tensor]:
        cut = Cut(y.shape[-1], 8, axis.size)
        own = cut.owned(axis.rank)
        with random_threads(axis.rank):
            return with_gradients(
                lambda a, b: mse_loss(a, b, axis=axis, cut=cut),
                y[..., own.start : own.stop],
                target[..., own.start : own.stop],
            )

    results = launch(work, degree=degree)
    assert all(bits_equal(result[0], results[0][0]) for result in results)
    return [results[0][0], *(torch.cat([r[i] for r in results], -1) for i in (1, 2))]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((32, 608), torch.float32),
        ((3, 5, 17), torch.float32),
        ((7,), torch.float32),
        ((4, 5), torch.float32),  # fewer units than leaves: ranks beyond the fifth own nothing
        ((1, 1), torch.float64),
        ((6, 101), torch.bfloat16),
    ],
    ids=str,
)
def test_mse_has_the_same_bits_at_every_degree(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y, target = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    expected = sharded_mse(y, target, 1)
    for degree in (2, 3, 8):
        assert all_bits_equal(sharded_mse(y, target, degree), expected)

    torchs = with_gradients(F.mse_loss, y.double(), target.double())
    for ours, theirs in zip(expected, torchs, strict=True):
        rtol = 1e-6 if dtype != torch.bfloat16 else 0.01
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=1e-9)


def test_sums_of_shards_break() -> None:
    """Negative control: one partial per rank, in place of one per leaf, has other bits."""

    def by_shards(y: Tensor, degree: int) -> Tensor:
        sizes = Cut(y.shape[-1], 8, degree).sizes()
        return torch.stack([sum_squares(part) for part in y.split(sizes, -1)]).cumsum(0)[-1]

    ys = [normal(32, 608, seed=seed) for seed in range(10)]
    assert any(not bits_equal(by_shards(y, 1), by_shards(y, 3)) for y in ys)


def test_mse_of_a_replicated_tensor() -> None:
    y, target = normal(5, 3, 7), normal(5, 3, 7, seed=1)
    ours = with_gradients(mse_loss, y, target)
    torchs = with_gradients(F.mse_loss, y, target)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert bits_equal(ours[2], -ours[1])
    for seed, (a, b) in enumerate([(strided(y), target), (misaligned(y, 5), strided(target))]):
        with random_threads(seed):
            assert all_bits_equal(with_gradients(mse_loss, a, b), ours)
    assert bits_equal(y, normal(5, 3, 7))
    assert torch.isnan(mse_loss(torch.ones(0), torch.ones(0)))


def test_mse_gradients_of_first_and_second_order() -> None:
    y = normal(3, 4).double().requires_grad_()
    target = normal(3, 4, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(mse_loss, (y, target))
    assert torch.autograd.gradgradcheck(mse_loss, (y, target))


def test_mse_counts_one_all_reduce_and_none_backward() -> None:
    def work(axis: Axis) -> dict[str, dict[str, dict[str, int]]]:
        cut = Cut(5, 8, axis.size)  # the last rank owns nothing
        y = normal(4, cut.sizes()[axis.rank]).requires_grad_()
        mse_loss(y, torch.zeros_like(y), axis=axis, cut=cut).backward()
        assert y.grad is not None
        assert y.grad.shape == y.shape
        return axis.transport.ledger.as_dict()

    for counts in launch(work, degree=6):
        assert counts["forward"]["all_reduce"]["calls"] == 1
        assert counts["forward"]["all_reduce"]["message_bytes"] == 4
        assert "backward" not in counts


def test_backward_reaches_what_lies_before_an_idle_rank() -> None:
    """Otherwise that rank stays away from the collectives of backward and the others wait."""

    def work(axis: Axis) -> Tensor | None:
        cut = Cut(5, 8, axis.size)
        x = normal(4, 3).requires_grad_()
        copies = collectives.all_reduce_grad(x, axis, cut=cut, who="x")
        leaves = [copy.sum(1, keepdim=True) for copy in copies]
        width = cut.sizes()[axis.rank]
        y = torch.cat(leaves, 1)[:, :width]
        mse_loss(y, torch.zeros_like(y), axis=axis, cut=cut).backward()
        return x.grad

    grads = launch(work, degree=6, timeout=60.0)
    assert grads[0] is not None
    assert all(grad is not None and bits_equal(grad, grads[0]) for grad in grads)


def test_mse_takes_no_temporary_larger_than_y() -> None:
    y, target = normal(31, 17).requires_grad_(), normal(31, 17, seed=1)
    axis, cut = Axis.solo(), Cut(17, 8, 1)
    for kwargs in ({}, {"axis": axis, "cut": cut}):
        with LargestNew(y, target) as largest:
            mse_loss(y, target, **kwargs).backward()
        assert 0 < largest.bytes <= 31 * 17 * 4


def test_mse_says_what_is_wrong() -> None:
    axis, cut = Axis.solo(), Cut(4, 8, 1)
    with pytest.raises(ShapeError, match=re.escape("shape (2, 4) and target (4,)")):
        mse_loss(torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ShapeError, match=re.escape("y has shape (2, 3)")):
        mse_loss(torch.ones(2, 3), torch.ones(2, 3), axis=axis, cut=cut)
    with pytest.raises(UsageError, match="axis is given without cut"):
        mse_loss(torch.ones(2), torch.ones(2), axis=axis)
    with pytest.raises(UsageError, match="cut is given without axis"):
        mse_loss(torch.ones(2), torch.ones(2), cut=cut)


def classes(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(count, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(32, 10), (1, 7), (7, 1), (50, 1001), (3, 40_001)], ids=str)
def test_cross_entropy_agrees_with_torch(shape: tuple[int, int], reduction: Any) -> None:
    logits, target = 3 * normal(*shape), classes(*shape)
    target[::3] = -100 if shape[0] > 1 else target[0]
    ours = with_gradients(lambda x: cross_entropy(x, target, reduction=reduction), logits)
    torchs = with_gradients(lambda x: F.cross_entropy(x, target, reduction=reduction), logits)
    for a, b in zip(ours, torchs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # Negative control: the loss of shifted targets is another.
    if shape[1] > 1:
        wrong = cross_entropy(logits, (target.clamp(min=0) + 1) % shape[1], reduction=reduction)
        assert not torch.allclose(wrong, torchs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 10), (1, 7), (50, 1001), (1, 40_001)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_bits_do_not_depend_on_layout_or_threads(
    shape: tuple[int, int], reduction: Any
) -> None:
    logits, target = 3 * normal(*shape), classes(*shape)

    def run(x: Tensor) -> list[Tensor]:
        return with_gradients(lambda x: cross_entropy(x, target, reduction=reduction), x)

    expected = run(logits)
    same = [strided(logits), misaligned(logits, 3), logits.t().contiguous().t(), logits]
    for seed, x in enumerate(same):
        with random_threads(seed):
            assert all_bits_equal(run(x), expected)


def test_cross_entropy_of_one_row_does_not_depend_on_the_others() -> None:
    logits, target = 3 * normal(50, 101), classes(50, 101)
    whole = cross_entropy(logits, target, reduction="none")
    for i in (0, 17, 49):
        row = cross_entropy(logits[i : i + 1], target[i : i + 1], reduction="none")
        assert bits_equal(row, whole[i : i + 1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_gradients_of_first_and_second_order(reduction: Any) -> None:
    logits = normal(5, 3).double().requires_grad_()
    target = torch.tensor([0, 2, -100, 1, 2])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: cross_entropy(x, target, reduction=reduction), logits)


def test_cross_entropy_of_bf16_is_computed_in_fp32() -> None:
    logits, target = (3 * normal(32, 11)).bfloat16(), classes(32, 11)
    narrow = with_gradients(lambda x: cross_entropy(x, target), logits)
    wide = with_gradients(lambda x: cross_entropy(x, target), logits.float())
    assert bits_equal(narrow[0], wide[0].bfloat16())
    torch.testing.assert_close(narrow[1], wide[1].bfloat16(), rtol=0.008, atol=0)


def test_cross_entropy_of_extreme_logits_is_torchs() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [[1e4, -1e4, 0.0], [-inf, 0.0, 1.0], [-inf, -inf, 2.0], [nan, 0.0, 1.0], [inf, 0.0, 1.0],
         [-inf, -inf, -inf]]
    )  # fmt: skip
    target = torch.tensor([1, 1, 2, 1, 1, 0])
    ours, torchs = (f(logits, target, reduction="none") for f in (cross_entropy, F.cross_entropy))
    assert ours.tolist() == pytest.approx(torchs.tolist(), nan_ok=True)
    assert torch.isnan(cross_entropy(logits[:2], torch.tensor([-100, -100])))
    assert cross_entropy(logits[:1], torch.tensor([7]), ignore_index=7, reduction="sum") == 0


def test_cross_entropy_takes_no_temporary_larger_than_the_logits() -> None:
    logits, target = normal(31, 17).requires_grad_(), classes(31, 17)
    with LargestNew(logits) as largest:
        cross_entropy(logits, target).backward()
    assert 0 < largest.bytes <= 31 * 17 * 4


def test_cross_entropy_says_what_is_wrong() -> None:
    logits = torch.ones(2, 3)
    with pytest.raises(ShapeError, match=re.escape("(2, 3) and (3,)")):
        cross_entropy(logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=re.escape("(2, 3, 4) and (2,)")):
        cross_entropy(torch.ones(2, 3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"target 3 is no class of 3.*0 to 2"):
        cross_entropy(logits, torch.tensor([0, 3]))
    with pytest.raises(UsageError, match="target -1 is no class"):
        cross_entropy(logits, torch.tensor([0, -1]))
    with pytest.raises(UsageError, match=r"int64, got torch.float32"):
        cross_entropy(logits, torch.ones(2))
    with pytest.raises(UsageError, match="reduction='max' is unknown"):
        cross_entropy(logits, torch.zeros(2, dtype=torch.int64), reduction="max")  # type: ignore[arg-type]
