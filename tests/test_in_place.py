"""What a layer or a collective returns may be written into, and what it was given may not."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from cut_block import cut_block, data, parts, run_everywhere
from invariance import bits_equal, normal
from places import Pool
from shardproof import collectives
from shardproof.axis import Axis
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.leaves import Cut


def test_an_activation_may_overwrite_the_output_of_a_layer(pool: Pool) -> None:
    def run(axis: Axis, is_in_place: bool) -> list[Tensor]:
        block, (x, grad_y) = cut_block(axis), data()
        block.act = nn.ReLU(inplace=is_in_place)
        y = block(x)
        y.mul_(2)
        y.backward(grad_y)
        return [y.detach(), x.grad, *parts(block)]

    found = run_everywhere(pool, lambda axis: run(axis, True))
    assert all(bits_equal(a, b) for a, b in zip(found, run(Axis.solo(), False), strict=True))


def test_every_output_may_be_overwritten(pool: Pool) -> None:
    """As that of `nn.Linear`: `y += residual`, in-place activations, in-place dropout."""

    def run(axis: Axis, leading: tuple[int, ...], is_in_place: bool) -> list[Tensor]:
        cut = Cut(14, 8, axis.size)
        owned = cut.owned(axis.rank)
        x = normal(*leading, 14, seed=8)
        part = x[..., owned.start : owned.stop]
        same: dict[str, Any] = {"axis": axis, "dim": -1, "cut": cut}
        acts: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [
            (x, ColumnParallelLinear(14, 9, axis=axis, bias=False, name="a")),
            (x, ColumnParallelLinear(14, 9, axis=axis, gather_output=True, name="b")),
            (part, ColumnParallelLinear(14, 9, axis=axis, gather_input=True, name="c")),
            (part, RowParallelLinear(14, 9, axis=axis, name="d")),
            (x, RowParallelLinear(14, 9, axis=axis, input_is_parallel=False, name="e")),
            (x, lambda x: collectives.all_reduce(x, axis)),
            (x, lambda x: collectives.shard(x, **same)),
            (part, lambda x: collectives.all_gather(x, **same, grad="partial")),
            (x, lambda x: collectives.reduce_scatter(x, **same)),
        ]
        found = []
        for given, act in acts:
            leaf = given.detach().requires_grad_()
            y = act(leaf)
            y = y.mul_(2) if is_in_place else y * 2
            y.sum().backward()
            found += [y.detach(), leaf.grad]
        return found

    for leading in ((5,), (2, 3)):
        for degree in (1, 2, 3):
            runs = [
                pool(degree, "threads").run(lambda axis, w=leading, f=flag: run(axis, w, f))
                for flag in (True, False)
            ]
            for found, wanted in zip(*runs, strict=True):
                assert len(found) == 18
                assert all(bits_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_input_that_is_overwritten_before_backward_raises(pool: Pool) -> None:
    def run(axis: Axis) -> str:
        block, (x, grad_y) = cut_block(axis), data()
        inner = x * 1
        y = block(inner)
        inner.add_(1)
        with pytest.raises(RuntimeError) as caught:
            y.backward(grad_y)
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        assert "has been modified by an inplace operation" in message
