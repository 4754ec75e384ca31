"""A sum runs while a product is computed only where the transport works alone; no bit changes."""

import dataclasses
from typing import Any

import pytest
from torch import Tensor

from cut_block import calls, cut_block
from invariance import bits_equal, normal
from places import CARRIER, EVERYWHERE, Pool
from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.ops import linear_products
from shardproof.transport.base import Pending, Transport


class Watched(Pending):
    """A sum that tells when it is waited for."""

    def __init__(self, inner: Pending, log: list[str]) -> None:
        self.inner, self.log = inner, log

    def wait(self) -> None:
        self.log.append("wait")
        self.inner.wait()


@Transport.register
class Watching:
    """A transport that tells when sums are started and waited for."""

    def __init__(self, axis: Axis, log: list[str], *, is_asynchronous: bool) -> None:
        self._inner, self._log, self.is_asynchronous = axis.transport, log, is_asynchronous

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start_sum(self, *args: Any, **named: Any) -> Pending:
        self._log.append("start")
        return Watched(self._inner.start_sum(*args, **named), self._log)


def watched(axis: Axis, log: list[str], *, is_asynchronous: bool) -> Axis:
    transport: Any = Watching(axis, log, is_asynchronous=is_asynchronous)
    return dataclasses.replace(axis, transport=transport)


def trained(axis: Axis, rows: int) -> list[Tensor]:
    block = cut_block(axis)
    x, grad_y = normal(rows, 14, seed=8).requires_grad_(), normal(rows, 14, seed=9)
    y = block(x)
    y.backward(grad_y)
    return [y.detach(), x.grad, block.up.weight.grad, block.down.weight.grad, block.up.bias.grad]


@EVERYWHERE
def test_a_sum_that_is_awaited_later_has_the_same_bits_and_counts_the_same(
    pool: Pool, degree: int, engine: str
) -> None:
    def run(axis: Axis) -> list[bool]:
        same = []
        for rows in (16, 100, 3):
            found = []
            for is_asynchronous in (False, True):
                axis.transport.ledger.reset()
                own = watched(axis, [], is_asynchronous=is_asynchronous) if degree > 1 else axis
                found.append((trained(own, rows), calls(axis)))
            (first, first_calls), (second, second_calls) = found
            same.append(first_calls == second_calls)
            same += [bits_equal(a, b) for a, b in zip(first, second, strict=True)]
        return same

    for found in pool(degree, engine).run(run):
        assert len(found) == 18
        assert all(found)


@pytest.mark.parametrize("engine", ["gloo", "processes", "threads"])
def test_only_torch_distributed_sums_while_its_rank_computes(pool: Pool, engine: str) -> None:
    found = pool(3, engine).run(lambda axis: (axis.transport.name, axis.transport.is_asynchronous))
    carrier = CARRIER if engine == "processes" else engine
    assert found == [(carrier, carrier == "gloo")] * 3


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_the_weight_gradient_is_computed_while_the_input_gradient_is_summed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, is_asynchronous: bool
) -> None:
    logs: tuple[list[str], list[str]] = ([], [])
    product = linear_products.weight_gradient

    def logged(a: Tensor, b: Tensor, split: Split) -> Tensor:
        logs[split.axis.rank].append("product")
        return product(a, b, split)

    monkeypatch.setattr(linear_products, "weight_gradient", logged)

    def run(axis: Axis) -> None:
        log = logs[axis.rank]
        block = cut_block(watched(axis, log, is_asynchronous=is_asynchronous))
        y = block(normal(40, 14, seed=8).requires_grad_())
        log.clear()
        y.backward(normal(40, 14, seed=9))

    pool(2, "threads").run(run)
    wanted = ["start", "product", "wait"] if is_asynchronous else ["start", "wait", "product"]
    assert logs == (wanted, wanted)
