"""`checked()`: what must be the same on all ranks is compared bit by bit, every element of it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import shardproof as sp
from agreeing import EVERY_TRANSPORT, check_all_said, drawn, mlp, plain, run, said
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import MismatchError
from shardproof.transport.notes import places_of


def with_norm(axis: Axis) -> nn.Module:
    model = nn.Sequential(*plain(), nn.LayerNorm(12))
    return sp.parallelize(model, {"0": sp.ColumnParallel(), "2": sp.RowParallel()}, axis)


@torch.no_grad()
def nudge(x: Tensor, place: int) -> None:
    """One element, by the smallest step there is."""
    flat = x.view(-1)
    flat[place] = torch.nextafter(flat[place], torch.tensor(float("inf")))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.named_parameters(), lr=lr)


@EVERY_TRANSPORT
def test_a_model_that_is_right_passes(pool: Pool, engine: str) -> None:
    def work(axis: Axis) -> str:
        model = with_norm(axis)
        optimizer = sgd(model)

        def train() -> None:
            for _ in range(2):
                optimizer.zero_grad()
                model(drawn(4, 12).requires_grad_()).square().mean().backward()
                optimizer.step()

        with sp.checked():
            return said(train)

    assert run(pool, engine, work, 3) == [""] * 3


@EVERY_TRANSPORT
def test_a_replicated_parameter_off_by_one_ulp_is_named(pool: Pool, engine: str) -> None:
    def work(axis: Axis) -> str:
        model = with_norm(axis)
        optimizer = sgd(model)
        if axis.rank == 1:
            nudge(model[3].weight, 5)
        with sp.checked():
            return said(optimizer.step)

    check_all_said(run(pool, engine, work, 3), "the parameter '3.weight'", "at [5], rank 1 has 1.0")


def test_a_replicated_bias_of_a_cut_layer_is_named_without_names(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        if axis.rank == 1:
            nudge(model[2].bias, 3)
        with sp.checked():
            return said(torch.optim.SGD(model.parameters(), lr=0.1).step)

    check_all_said(run(pool, "threads", work), "the parameter '2.bias'", "float32 (12,)", "at [3]")


def test_a_plain_parameter_without_a_name_is_numbered(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = with_norm(axis)
        if axis.rank == 1:
            nudge(model[3].bias, 0)
        with sp.checked():
            return said(torch.optim.SGD(model.parameters(), lr=0.1).step)

    check_all_said(run(pool, "threads", work), "the parameter 'number 5 of the optimizer'")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_part_that_a_parametrization_has_taken_is_no_replica(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = with_norm(axis)
        parametrize.register_parametrization(model[0], "weight", Doubled())
        with sp.checked():
            return said(sgd(model).step)

    assert run(pool, "threads", work, 2) == ["", ""]


@EVERY_TRANSPORT
def test_an_input_that_differs_where_no_sample_looks_is_named(pool: Pool, engine: str) -> None:
    unseen = next(i for i in range(30 * 12) if i not in places_of(30 * 12))

    def work(axis: Axis) -> tuple[str, str]:
        model, x = mlp(axis), drawn(30, 12)
        if axis.rank == 1:
            nudge(x, unseen)
        sampled = said(lambda: model(x))
        with sp.checked():
            return sampled, said(lambda: model(x))

    found = run(pool, engine, work)
    assert [sampled for sampled, _ in found] == ["", ""]
    at = str([unseen // 12, unseen % 12])
    check_all_said(
        [message for _, message in found], "the input of '0'", f"rank 0 has {at}"[:10], at
    )


def test_an_output_that_differs_is_named(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        with torch.no_grad():
            model[2].bias[4] += axis.rank
        with sp.checked():
            return said(lambda: model(drawn(3, 12)))

    check_all_said(run(pool, "threads", work), "the output of '2'", "at [0, 4]")


def test_a_gradient_that_differs_is_named(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        x = drawn(30, 12).requires_grad_()
        with sp.checked():
            y = mlp(axis)(x)
            grad = torch.ones_like(y)
            grad[7, 7] += axis.rank
            return said(lambda: y.backward(grad))

    check_all_said(run(pool, "threads", work), "the gradient of the output of '2'", "at [7, 7]")


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_learning_rates_that_differ_are_named(
    pool: Pool, make: Callable[..., torch.optim.Optimizer]
) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        optimizer = make(model.parameters(), lr=0.1 * (1 + axis.rank))
        with sp.checked():
            return said(optimizer.step)

    check_all_said(run(pool, "threads", work), "lr of group 0, rank 0 has 0.1, rank 1 has 0.2")


def test_outside_it_no_step_is_compared(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, int]:
        model = with_norm(axis)
        with sp.checked():
            sgd(model).step()
        before = axis.transport.calls  # type: ignore[attr-defined]
        optimizer = sgd(model, lr=0.1 * (1 + axis.rank))
        return said(optimizer.step), axis.transport.calls - before  # type: ignore[attr-defined]

    assert run(pool, "threads", work) == [("", 0), ("", 0)]


def test_it_is_left_by_an_error_and_may_be_nested(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, str, str]:
        model = mlp(axis)
        x = drawn(30, 12)
        with pytest.raises(MismatchError), sp.checked():
            model(drawn(30, 12, seed=axis.rank))
        if axis.rank == 1:
            nudge(x, next(i for i in range(360) if i not in places_of(360)))
        outside = said(lambda: model(x))
        with sp.checked():
            with sp.checked():
                inner = said(lambda: model(x))
            return outside, inner[:10], said(lambda: model(x))[:10]

    assert run(pool, "threads", work) == [("", "the ranks ", "the ranks ")] * 2


def test_equal_nan_and_views_pass(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        x = drawn(12, 6).t()
        x[0, 0] = float("nan")
        with sp.checked():
            return said(
                lambda: [model(each) for each in (x, x[::2], x[:0], x[0], x.expand(2, 6, 12))]
            )

    assert run(pool, "threads", work, 3) == [""] * 3


def test_no_bit_changes_under_it(pool: Pool) -> None:
    def work(axis: Axis) -> bool:
        model, other = mlp(axis), None
        x = drawn(4, 12)
        with sp.checked():
            other = copy.deepcopy(model)(x)
        return torch.equal(model(x), other)

    assert run(pool, "threads", work) == [True, True]


def test_settings_that_are_tensors_and_a_shape_that_differs(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, str]:
        model = mlp(axis)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1 * (1 + axis.rank)))
        with sp.checked():
            first = said(optimizer.step)
            return first, said(lambda: model[0](drawn(4 + axis.rank, 12)))

    found = run(pool, "threads", work)
    check_all_said([first for first, _ in found], "lr of group 0")
    check_all_said(
        [second for _, second in found], "rank 0 has float32 (4, 12), rank 1 has float32 (5, 12)"
    )
