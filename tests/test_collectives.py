"""The differentiable pairs: values and gradients against the unsharded expression."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from invariance import bits_equal, normal
from places import EVERYWHERE, Pool
from shardproof.axis import Axis
from shardproof.comm import differentiable as collectives
from shardproof.errors import MismatchError, ShapeError, UsageError
from shardproof.leaves import Cut

SIZES = (64, 11, 3, 1)  # uneven at 2 and 3 ranks, some ranks empty at 2, 3 and 8
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


def scales(axis: Axis) -> list[float]:
    """By what each rank multiplies: its own use of a tensor that all have."""
    return [1.0 + 0.5 * rank for rank in range(axis.size)]


def leaf(x: Tensor) -> Tensor:
    """A leaf of autograd that is not contiguous where it can be."""
    return x.transpose(0, -1).contiguous().transpose(0, -1).detach().requires_grad_()


def part(x: Tensor, cut: Cut, axis: Axis, dim: int = -1) -> Tensor:
    owned = cut.owned(axis.rank)
    return x.narrow(dim, owned.start, len(owned))


def check_identity_then_all_reduce(axis: Axis) -> None:
    """Each rank uses x its own way: the gradient of x is the sum of all uses."""
    for dtype in DTYPES:
        x, w = leaf(normal(4, 7).to(dtype)), normal(4, 7, seed=1).to(dtype)
        before = x.detach().clone()
        alias = collectives.all_reduce_grad(x, axis)
        y = collectives.all_reduce(alias * w * scales(axis)[axis.rank], axis)
        assert_close(y, before * w * sum(scales(axis)), **TOLERANCE[dtype])
        y.sum().backward()
        assert_close(x.grad, w * sum(scales(axis)), **TOLERANCE[dtype])
        assert torch.equal(x, before)


def by_leaves(axis: Axis, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """y = sum over leaves of x * w[leaf], and the gradient of x; a rank may own no leaf."""
    cut = Cut(size, 8, axis.size)
    x = leaf(normal(5, 9).to(dtype))
    run = cut.run(axis.rank)
    copies = collectives.all_reduce_grad(x, axis, cut=cut)
    partials = [copies[i] * normal(5, 9, seed=10 + at).to(dtype) for i, at in enumerate(run)]
    y = collectives.all_reduce(partials, axis, cut=cut, like=copies[0])
    y.backward(normal(5, 9, seed=3).to(dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def check_leaves_against_autograd(axis: Axis) -> None:
    for size in SIZES:
        y, grad = by_leaves(axis, size, torch.float64)
        total = sum(normal(5, 9, seed=10 + at).double() for at in range(min(8, size)))
        assert_close(y, normal(5, 9).double() * total, **TOLERANCE[torch.float64])
        assert_close(grad, normal(5, 9, seed=3).double() * total, **TOLERANCE[torch.float64])


def check_leaves_keep_their_bits(axis: Axis) -> None:
    for size in SIZES:
        for dtype in DTYPES:
            alone = by_leaves(Axis.solo(), size, dtype)
            for found, expected in zip(by_leaves(axis, size, dtype), alone, strict=True):
                assert found.dtype == dtype
                assert bits_equal(found, expected), (size, dtype)


def check_shard_then_gather(axis: Axis) -> None:
    """A slice forward and a gather back, used alike by all ranks: exact, nothing is summed."""
    for size in SIZES:
        cut = Cut(size, 8, axis.size)
        for dim, shape in ((-1, (4, size)), (0, (size, 3)), (1, (2, size, 3))):
            for dtype in DTYPES:
                x, w = leaf(normal(*shape).to(dtype)), normal(*shape, seed=1).to(dtype)
                before = x.detach().clone()
                mine = collectives.shard(x, axis, dim=dim, cut=cut)
                assert torch.equal(mine, part(before, cut, axis, dim))
                z = mine * part(w, cut, axis, dim)
                y = collectives.all_gather(z, axis, dim=dim, cut=cut, grad="replicate")
                assert torch.equal(y, before * w)
                y.sum().backward()
                assert torch.equal(x.grad, w), (size, dim, dtype)
                with torch.no_grad():
                    mine.fill_(7)
                assert torch.equal(x, before)


def check_gather_used_differently(axis: Axis) -> None:
    """Each rank uses the whole its own way: its part's gradient is the sum of all uses."""
    for size in SIZES:
        cut = Cut(size, 8, axis.size)
        for dtype in (torch.float64, torch.bfloat16):
            full, w = normal(4, size).to(dtype), normal(4, size, seed=1).to(dtype)
            x = leaf(part(full, cut, axis))
            y = collectives.all_gather(x, axis, dim=-1, cut=cut, grad="partial")
            assert torch.equal(y, full)
            collectives.all_reduce(y * w * scales(axis)[axis.rank], axis).sum().backward()
            expected = part(w, cut, axis) * sum(scales(axis))
            assert_close(x.grad, expected, **TOLERANCE[dtype])


def check_reduce_scatter(axis: Axis) -> None:
    for size in SIZES:
        cut = Cut(size, 8, axis.size)
        for dim, shape in ((-1, (4, size)), (0, (size, 3))):
            full, w = normal(*shape).double(), normal(*shape, seed=1).double()
            x = leaf(full * scales(axis)[axis.rank])
            y = collectives.reduce_scatter(x, axis, dim=dim, cut=cut)
            expected = part(full, cut, axis, dim) * sum(scales(axis))
            assert_close(y, expected, **TOLERANCE[torch.float64])
            (y * part(w, cut, axis, dim)).sum().backward()
            assert torch.equal(x.grad, w)


def check_a_sibling_branch_keeps_its_gradient(axis: Axis) -> None:
    """In `x + f(x)` a reduction in place would add the other branch, or overwrite the gradient."""
    x, given = leaf(normal(4, 7).double()), normal(4, 7, seed=2).double()
    before = given.clone()
    inner = collectives.all_reduce_grad(x, axis) * scales(axis)[axis.rank]
    (x + collectives.all_reduce(inner, axis)).backward(given)
    assert_close(x.grad, before * (1 + sum(scales(axis))), **TOLERANCE[torch.float64])
    assert torch.equal(given, before)


def check_gradients_are_no_aliases(axis: Axis) -> None:
    cut = Cut(8, 8, axis.size)
    partials = [leaf(normal(3, 4)) for _ in cut.run(axis.rank)]
    given = torch.ones(3, 4)
    collectives.all_reduce(partials, axis, cut=cut).backward(given)
    memory = [x.grad.untyped_storage().data_ptr() for x in partials]
    assert len(set(memory)) == len(partials)
    assert given.untyped_storage().data_ptr() not in memory


@EVERYWHERE
@pytest.mark.parametrize(
    "check",
    [
        check_identity_then_all_reduce,
        check_leaves_against_autograd,
        check_leaves_keep_their_bits,
        check_shard_then_gather,
        check_gather_used_differently,
        check_reduce_scatter,
        check_a_sibling_branch_keeps_its_gradient,
        check_gradients_are_no_aliases,
    ],
    ids=lambda check: check.__name__,
)
def test_gradients_are_those_of_the_unsharded_expression(
    pool: Pool, degree: int, engine: str, check: Callable[[Axis], None]
) -> None:
    pool(degree, engine).run(check)


def gradient_of_a_gather(axis: Axis, *, grad: str, is_used_alike: bool) -> tuple[Tensor, Tensor]:
    """This rank's gradient and the right one."""
    cut, w = Cut(12, 8, axis.size), normal(2, 12, seed=1)
    x = leaf(part(normal(2, 12), cut, axis))
    y = collectives.all_gather(x, axis, dim=-1, cut=cut, grad=grad) * w  # type: ignore[arg-type]
    if is_used_alike:
        y.sum().backward()
        return x.grad, part(w, cut, axis)
    collectives.all_reduce(y * scales(axis)[axis.rank], axis).sum().backward()
    return x.grad, part(w, cut, axis) * sum(scales(axis))


def test_the_wrong_gradient_of_a_gather_is_wrong(pool: Pool) -> None:
    """The negative control: why `all_gather` has no default."""
    for is_used_alike, right, wrong in (
        (True, "replicate", "partial"),
        (False, "partial", "replicate"),
    ):
        for grad, is_right in ((right, True), (wrong, False)):
            for found, expected in pool(3, "threads").run(
                lambda axis, g=grad, a=is_used_alike: gradient_of_a_gather(
                    axis, grad=g, is_used_alike=a
                )
            ):
                assert torch.allclose(found, expected, rtol=1e-5) == is_right


def added_by_ranks(axis: Axis) -> Tensor:
    cut = Cut(8, 8, axis.size)
    mine = [normal(5, 9) * normal(5, 9, seed=10 + at) for at in cut.run(axis.rank)]
    return collectives.all_reduce(torch.stack(mine).sum(0), axis)


def test_one_partial_per_rank_changes_the_bits_with_the_degree(pool: Pool) -> None:
    """The negative control: what each rank has added up cannot be added in the tree's order."""
    tree = by_leaves(Axis.solo(), 8)[0]
    sums = [pool(degree, "threads").run(added_by_ranks)[0] for degree in (1, 2, 3, 8)]
    assert all(torch.allclose(x, tree, rtol=1e-4, atol=1e-5) for x in sums)
    assert not all(bits_equal(sums[0], x) for x in sums[1:])


def test_a_gradient_cannot_be_differentiated_again() -> None:
    axis, x = Axis.solo(), leaf(normal(2, 3))
    y = collectives.all_reduce(collectives.all_reduce_grad(x, axis) ** 2, axis)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"differentiate twice .* marked with @once_differentiable"
    ):
        grad.sum().backward()


def test_all_gather_has_no_default_for_its_gradient() -> None:
    axis, cut = Axis.solo(), Cut(3, 8, 1)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'grad'"):
        collectives.all_gather(normal(3), axis, dim=0, cut=cut)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"grad='sum' is unknown\. Use 'replicate'"):
        collectives.all_gather(normal(3), axis, dim=0, cut=cut, grad="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (
            lambda axis: collectives.all_reduce([normal(3)], axis, cut=Cut(8, 8, 1), who="up"),
            "all_reduce of up on rank 0 of 1 on axis 'tp': 8 partials wanted, .* got 1",
        ),
        (
            lambda axis: collectives.all_reduce([normal(3)] * 2, axis),
            "1 partials wanted, one per owned leaf, got 2",
        ),
        (
            lambda axis: collectives.all_reduce([normal(3)], axis, cut=Cut(8, 8, 2)),
            "the cut is for degree 2 and the axis has 1 ranks",
        ),
        (
            lambda axis: collectives.all_reduce_grad(normal(3), axis, cut=Cut(8, 8, 3)),
            "the cut is for degree 3 and the axis has 1 ranks",
        ),
        (
            lambda axis: collectives.shard(normal(2, 9), axis, dim=-1, cut=Cut(8, 8, 1)),
            r"dim -1 of shape \(2, 9\) has 9 units, but 8 is the whole",
        ),
        (
            lambda axis: collectives.shard(normal(2, 8), axis, dim=2, cut=Cut(8, 8, 1)),
            r"dim 2 wanted of a tensor of shape \(2, 8\)",
        ),
        (
            lambda axis: collectives.reduce_scatter(normal(9), axis, dim=0, cut=Cut(8, 8, 1)),
            "has 9 units, but 8 is the whole",
        ),
    ],
)
def test_what_does_not_fit_raises(act: Callable[[Axis], object], text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        act(Axis.solo())


def idle_without_like(axis: Axis) -> str:
    if axis.rank == 1:
        with pytest.raises(ShapeError) as caught:
            collectives.all_reduce([], axis, cut=Cut(1, 8, 2), who="up")
        return str(caught.value)
    return ""


def test_an_idle_rank_must_say_what_it_is_like(pool: Pool) -> None:
    message = pool(2, "threads").run(idle_without_like)[1]
    assert "rank 1 of 2 on axis 'tp': this rank owns no leaf, so `like` must give" in message


def backward_of_other_shapes(axis: Axis) -> str:
    x = leaf(normal(2, 3 + min(axis.rank, 1)))
    with pytest.raises(MismatchError) as caught:
        collectives.all_reduce_grad(x, axis, who="up").sum().backward()
    return str(caught.value)


def test_ranks_that_disagree_in_backward_all_raise(pool: Pool) -> None:
    for message in pool(3, "threads").run(backward_of_other_shapes):
        assert "rank 0: backward all_reduce of up: float32 (2, 3)" in message
        assert "ranks 1 and 2: backward all_reduce of up: float32 (2, 4)" in message
