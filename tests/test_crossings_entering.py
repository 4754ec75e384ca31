"""One sum of input gradients for all columns of one tensor: bits, collectives, odd backwards."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cut_dims import DIMS, WIDTH, Results, agrees, gradients, leaf, same_at_every_degree
from invariance import bits_equal, normal
from places import Pool
from shardproof.axis import Axis
from shardproof.ops import input_gradients as entering_module
from shardproof.ops.input_gradients import Entering
from shardproof.ops.unit_linear import column
from shardproof.ops.unit_moves import gather, held_part
from shardproof.ops.unit_products import ProductTerm, start_sum
from shardproof.scheme import Numerics

# Five columns of one input: of six leaves, of eight, of five; plain, shared and fused.
NAMES = ("fused", "keys", "features", "gate and up", "heads")
TREES = 3


def weights(dtype: torch.dtype) -> list[Tensor]:
    return [normal(DIMS[name].size, WIDTH, seed=seed).to(dtype) for seed, name in enumerate(NAMES)]


class Columns:
    """The columns of one input on one rank."""

    def __init__(
        self, axis: Axis, dtype: torch.dtype = torch.float32, numerics: Numerics = "invariant"
    ) -> None:
        self.places = [DIMS[name].place(axis, numerics=numerics) for name in NAMES]
        self.weights = [
            leaf(held_part(w, 0, place))
            for w, place in zip(weights(dtype), self.places, strict=True)
        ]
        self.axis, self.entering = axis, Entering()

    def __call__(self, x: Tensor, which: tuple[int, ...] = (0, 1, 2, 3, 4)) -> list[Tensor]:
        """The outputs, whole: a loss of them mixes all features."""
        return [
            gather(
                column(x, self.weights[n], None, self.places[n], entering=self.entering),
                -1,
                self.places[n],
            )
            for n in which
        ]

    def calls(self) -> int:
        """All-reduces of backward since the last time."""
        table = self.axis.transport.ledger.as_dict()
        self.axis.transport.ledger.reset()
        return table.get("backward", {}).get("all_reduce", {}).get("calls", 0)


def expected(columns: Columns, trees: int) -> int:
    return trees if columns.axis.size > 1 else 0


def loss_of(ys: list[Tensor]) -> Tensor:
    return torch.stack([(y * normal(*y.shape, seed=9)).sum() for y in ys]).sum()


def test_one_sum_for_each_kind_of_tree(pool: Pool) -> None:
    def joined(axis: Axis) -> Results:
        columns, x = Columns(axis), leaf(normal(2, 17, WIDTH, seed=7))
        z = x * 2
        ys = columns(z)
        columns.calls()
        (grad_x,) = gradients(loss_of(ys), torch.ones(()), x)
        assert columns.calls() == expected(columns, TREES)
        return {"x": grad_x}

    found = same_at_every_degree(pool, joined)
    x = leaf(normal(2, 17, WIDTH, seed=7).double())
    ys = [2 * x @ w.t() for w in weights(torch.float64)]
    agrees(found, {"x": gradients(loss_of(ys), torch.ones(()), x)[0]}, 1e-5)


@pytest.mark.parametrize("which", [(0,), (0, 1), (3, 2), (4, 1, 2)])
def test_columns_without_a_gradient_are_left_out(pool: Pool, which: tuple[int, ...]) -> None:
    """The bits are those of the same columns alone."""

    def some(axis: Axis) -> Results:
        columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))
        ys = columns(x)
        (grad_some,) = gradients(loss_of([ys[n] for n in sorted(which)]), torch.ones(()), x)
        alone = Columns(axis)(x, tuple(sorted(which)))
        (grad_alone,) = gradients(loss_of(alone), torch.ones(()), x)
        assert bits_equal(grad_some, grad_alone)
        return {"x": grad_some}

    same_at_every_degree(pool, some, (1, 2, 3))


def test_native_columns_share_one_sum(pool: Pool) -> None:
    def joined(axis: Axis) -> Results:
        columns, x = Columns(axis, torch.float64, "native"), leaf(normal(5, WIDTH).double())
        ys = columns(x)
        columns.calls()
        (grad_x,) = gradients(loss_of(ys), torch.ones(()), x)
        assert columns.calls() == expected(columns, 1)
        return {"x": grad_x}

    x = leaf(normal(5, WIDTH).double())
    ys = [x @ w.t() for w in weights(torch.float64)]
    wanted = {"x": gradients(loss_of(ys), torch.ones(()), x)[0]}
    for degree in (1, 2, 8):
        for found in pool(degree, "threads").run(joined):
            agrees(found, wanted)


def test_the_order_is_that_of_forward(pool: Pool) -> None:
    """Autograd comes by in the other order; products are added from the first to the last."""

    def orders(axis: Axis) -> Results:
        columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))
        arrived, grads = [], {}
        outputs = []
        for n in (0, 1, 4):
            y = column(x, columns.weights[n], None, columns.places[n], entering=columns.entering)
            y.register_hook(lambda grad, n=n: (arrived.append(n), grads.__setitem__(n, grad))[0])
            outputs.append(gather(y, -1, columns.places[n]))
        (grad_x,) = gradients(loss_of(outputs), torch.ones(()), x)
        assert arrived == [4, 1, 0]
        total = None
        for numbers in ((0, 1), (4,)):  # of six leaves, of five
            terms = [
                ProductTerm(grads[n], columns.weights[n].detach(), columns.places[n])
                for n in numbers
            ]
            part = start_sum(terms, x.detach(), "prover", "by hand").wait()
            total = part if total is None else total + part
        assert total is not None
        assert bits_equal(grad_x, total)
        return {"x": grad_x}

    same_at_every_degree(pool, orders, (1, 3))


def test_a_graph_that_is_kept_gives_the_same_again(pool: Pool) -> None:
    def twice(axis: Axis) -> None:
        columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))
        ys = columns(x)
        columns.calls()
        loss = loss_of(ys)
        found = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(3)]
        assert columns.calls() == expected(columns, 3 * TREES)
        assert bits_equal(found[0], found[1])
        assert bits_equal(found[0], found[2])
        # The parts of a loss, one after the other.
        x.grad = None
        loss_of(ys[:2]).backward(retain_graph=True)
        loss_of(ys[2:]).backward()
        torch.testing.assert_close(x.grad, found[0], rtol=1e-5, atol=1e-4)

    for degree in (1, 2):
        pool(degree, "threads").run(twice)


def test_gradients_of_weights_alone_sum_nothing_and_leave_nothing(pool: Pool) -> None:
    def weights_alone(axis: Axis) -> None:
        columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))
        ys = columns(x)
        columns.calls()
        _, pending = columns.entering.token(x)
        torch.autograd.grad(loss_of(ys), columns.weights, retain_graph=True)
        assert columns.calls() == 0
        assert not pending._left
        torch.autograd.grad(loss_of(ys), [x, *columns.weights])
        assert columns.calls() == expected(columns, TREES)
        assert not pending._left

    pool(2, "threads").run(weights_alone)


def test_checkpointed_columns(pool: Pool) -> None:
    def checkpointed(axis: Axis) -> Results:
        found: list[Tensor] = []
        for how in (None, False, True):
            columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))

            def inside(x: Tensor, columns: Columns = columns) -> Tensor:
                return loss_of(columns(x * 2))

            loss = inside(x) if how is None else checkpoint(inside, x, use_reentrant=how)
            columns.calls()
            loss.backward()
            assert columns.calls() == expected(columns, TREES)
            found += [x.grad, columns.weights[0].grad]
        assert bits_equal(found[0], found[2])
        assert bits_equal(found[0], found[4])
        assert bits_equal(found[1], found[5])
        return {"x": found[0]}

    same_at_every_degree(pool, checkpointed, (1, 2, 3))


def test_without_gradients_and_then_with(pool: Pool) -> None:
    def mixed(axis: Axis) -> None:
        columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))
        with torch.no_grad():
            before = columns(x)
        ys = columns(x)
        assert all(bits_equal(a, b) for a, b in zip(before, ys, strict=True))
        columns.calls()
        loss_of(ys).backward()
        assert columns.calls() == expected(columns, TREES)
        frozen = Columns(axis)
        for weight in frozen.weights:
            weight.requires_grad_(False)
        y = leaf(x)
        loss_of(frozen(y)).backward()
        assert bits_equal(x.grad, y.grad)
        assert all(weight.grad is None for weight in frozen.weights)
        data = x.detach()
        loss_of(columns(data)).backward()
        assert data.grad is None

    pool(2, "threads").run(mixed)


def test_a_write_between_two_columns_makes_two_sums(pool: Pool) -> None:
    def written(axis: Axis) -> None:
        columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))
        for weight in columns.weights:
            weight.requires_grad_(False)
        z = x * 1
        first = columns(z, (2,))
        z.mul_(3)
        second = columns(z, (2,))
        columns.calls()
        (grad_x,) = gradients(loss_of(first + second), torch.ones(()), x)
        assert columns.calls() == expected(columns, 2)
        w = weights(torch.float32)[2]
        wanted = gradients(loss_of([x @ w.t(), 3 * x @ w.t()]), torch.ones(()), x)[0]
        torch.testing.assert_close(grad_x, wanted, rtol=1e-4, atol=1e-4)
        # The same handle, another tensor.
        other = leaf(x)
        grads = gradients(
            loss_of(columns(other, (2,)) + columns(x, (2,))), torch.ones(()), x, other
        )
        assert bits_equal(*grads)

    pool(2, "threads").run(written)


def test_a_second_derivative_is_refused(pool: Pool) -> None:
    def twice(axis: Axis) -> None:
        columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))
        (grad_x,) = torch.autograd.grad(loss_of(columns(x)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad_x.sum().backward()

    for degree in (1, 2):
        pool(degree, "threads").run(twice)


def test_a_handle_beside_its_tensor_makes_no_cycle() -> None:
    axis = Axis.solo()
    columns, x = Columns(axis), leaf(normal(5, WIDTH))
    gc.collect()
    gc.disable()
    try:
        x.handle = columns.entering  # type: ignore[attr-defined]
        ys = columns(x)
        gone = weakref.ref(x)
        del ys, x
        assert gone() is None
    finally:
        gc.enable()


def _by_backward(patch: pytest.MonkeyPatch) -> None:
    """Joined in the order in which autograd comes by."""

    def empty(pending: Any) -> list[Any]:
        left: list[Any] = pending._left.pop(torch._C._current_graph_task_id(), [])
        return left

    patch.setattr(entering_module.PendingTerms, "empty", empty)


def test_the_order_of_backward_would_be_seen(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    _by_backward(monkeypatch)
    with pytest.raises(Exception, match="bits_equal"):
        test_the_order_is_that_of_forward(pool)


def test_a_backward_that_failed_leaves_nothing_to_the_next(pool: Pool) -> None:
    def failed(axis: Axis) -> None:
        columns, x = Columns(axis), leaf(normal(5, WIDTH, seed=7))
        z = x * 2
        ys = columns(z)
        (wanted,) = torch.autograd.grad(loss_of(ys), x, retain_graph=True)
        fails = [True]

        def fail(grad: Tensor) -> Tensor:
            if fails:
                raise ValueError("planted")
            return grad

        ys[0].register_hook(fail)  # the last that backward comes to
        with pytest.raises(ValueError, match="planted"):
            torch.autograd.grad(loss_of(ys[::-1]), x, retain_graph=True)
        fails.clear()
        (again,) = torch.autograd.grad(loss_of(ys), x)
        assert bits_equal(wanted, again)

    for degree in (1, 2):
        pool(degree, "threads").run(failed)
