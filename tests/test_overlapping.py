"""What runs while a product is computed changes no bit, and the ledger counts the same."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cut_block import calls, cut_block
from invariance import bits_equal, normal
from places import EVERYWHERE, TOGETHER, Pool
from shardproof.axis import Axis
from shardproof.functional.site import LinearSite
from shardproof.numerics import mode
from shardproof.numerics.matmul import SMALL_ROWS
from shardproof.overlap import Overlap
from shardproof.transport.base import Pending, Transport

OVERLAPS = tuple(
    Overlap(backward=backward, chunks=chunks) for backward in (True, False) for chunks in (1, 2, 5)
)
# Small as a whole; small in parts alone; neither; fewer rows than chunks.
ROWS = (SMALL_ROWS, 2 * SMALL_ROWS, 100, 3)


def trained(axis: Axis, rows: int, overlap: Overlap) -> list[Tensor]:
    own = dataclasses.replace(axis, overlap=overlap)
    block = cut_block(own)
    x, grad_y = normal(rows, 14, seed=8).requires_grad_(), normal(rows, 14, seed=9)
    y = block(x)
    y.backward(grad_y)
    return [y.detach(), x.grad, block.up.weight.grad, block.down.weight.grad, block.up.bias.grad]


@EVERYWHERE
def test_bits_are_the_same_with_every_overlap(pool: Pool, degree: int, engine: str) -> None:
    def run(axis: Axis) -> list[bool]:
        same = []
        for rows in ROWS:
            first = trained(axis, rows, Overlap(backward=False, chunks=1))
            for overlap in OVERLAPS:
                found = trained(axis, rows, overlap)
                same.append(all(bits_equal(a, b) for a, b in zip(first, found, strict=True)))
        return same

    for found in pool(degree, engine).run(run):
        assert len(found) == len(ROWS) * len(OVERLAPS)
        assert all(found)


@TOGETHER
def test_the_ledger_counts_one_collective_however_it_is_cut(
    pool: Pool, degree: int, engine: str
) -> None:
    def run(axis: Axis) -> list[dict[str, int]]:
        found = []
        for overlap in OVERLAPS:
            axis.transport.ledger.reset()
            trained(axis, 100, overlap)
            found.append(calls(axis))
        return found

    for found in pool(degree, engine).run(run):
        assert found == [{"forward": 1, "backward": 1}] * len(OVERLAPS)


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

    def __init__(self, axis: Axis, log: list[str]) -> None:
        self._inner, self._log = axis.transport, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start_sum(self, *args: Any, **named: Any) -> Pending:
        self._log.append("start")
        return Watched(self._inner.start_sum(*args, **named), self._log)


def watched(axis: Axis, overlap: Overlap, log: list[str]) -> Axis:
    return dataclasses.replace(axis, transport=Watching(axis, log), overlap=overlap)


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_of_the_forward_overlap(pool: Pool, chunks: int) -> None:
    """The second part is started before the first is waited for, and so on.

    In leaf shapes the rows are not cut: their number is a part of the shape.
    """

    def run(axis: Axis) -> list[str]:
        log: list[str] = []
        cut_block(watched(axis, Overlap(chunks=chunks), log))(normal(40, 14, seed=8))
        return log

    wanted = {1: ["start", "wait"], 3: ["start", "start", "wait", "start", "wait", "wait"]}
    is_leafwise = mode.is_leafwise(torch.float32, torch.device("cpu"))
    for log in pool(2, "threads").run(run):
        assert log == wanted[1 if is_leafwise else chunks]


@pytest.mark.parametrize("backward", [True, False])
def test_the_weight_gradient_is_computed_while_the_input_gradient_is_summed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    logs: tuple[list[str], list[str]] = ([], [])
    product = LinearSite.weight_gradient

    def logged(site: LinearSite, a: Tensor, b: Tensor) -> Tensor:
        logs[site.axis.rank].append("product")
        return product(site, a, b)

    monkeypatch.setattr(LinearSite, "weight_gradient", logged)

    def run(axis: Axis) -> None:
        block = cut_block(watched(axis, Overlap(backward=backward), logs[axis.rank]))
        y = block(normal(40, 14, seed=8).requires_grad_())
        logs[axis.rank].clear()
        y.backward(normal(40, 14, seed=9))

    pool(2, "threads").run(run)
    wanted = ["start", "product", "wait"] if backward else ["start", "wait", "product"]
    assert logs == (wanted, wanted)
