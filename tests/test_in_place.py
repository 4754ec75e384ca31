"""What a layer or a collective returns may be written into, and what it was given may not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cut_block import cut_block, data, parts, run_everywhere
from invariance import bits_equal, normal
from places import Pool
from shardproof.axis import Axis
from shardproof.comm import differentiable as collectives
from shardproof.errors import ShapeError
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.layers.norm import LayerNorm, RMSNorm
from shardproof.leaves import Cut
from shardproof.numerics.sums import sum_all
from shardproof.ops.losses import mse_loss
from shardproof.ops.norms import layer_norm, rms_norm
from shardproof.ops.rms_norm import RmsFormula


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
            (x, LayerNorm(14)),
            (x.transpose(0, -1).contiguous().transpose(0, -1), LayerNorm(14)),
            (x, RMSNorm(14, RmsFormula(1e-6))),
            (x, lambda x: rms_norm(x, None, eps=1e-6)),
            (x, lambda x: layer_norm(x, None, None)),
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
                assert len(found) == 28
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


@pytest.mark.parametrize("how", ["itself", "base", "no_grad", "expanded", "ids"])
def test_what_is_overwritten_between_forward_and_backward_raises(pool: Pool, how: str) -> None:
    """Torch sees it, also through a view, a buffer that was expanded, and the ids of a lookup."""

    def run(axis: Axis) -> str:
        layer: nn.Module = ColumnParallelLinear(14, 9, axis=axis, name="a")
        base = normal(5, 14, seed=8)
        x = base[1:2].expand(3, 14) if how == "expanded" else base[:, :]
        if how == "ids":
            layer, base = VocabParallelEmbedding(14, 9, axis=axis, name="e"), torch.arange(14)
            x = base if axis.size == 1 else base.view(7, 2)
        y = layer(x)
        with torch.no_grad():
            (x if how in ("itself", "no_grad") else base).mul_(2)
        try:
            y.sum().backward()
        except RuntimeError as error:
            return str(error)
        # Ids were copied where they were counted from this rank's first row.
        return "copied" if how == "ids" and axis.size > 1 else "silent"

    for degree in (1, 3):
        for message in pool(degree, "threads").run(run):
            assert "modified by an inplace operation" in message or message == "copied"


def test_tensors_of_no_dims_and_inputs_without_gradients(pool: Pool) -> None:
    """A layer wants a last dim; a loss of one number is one; weights get gradients all the same."""

    def run(axis: Axis) -> None:
        for layer in (
            ColumnParallelLinear(14, 9, axis=axis, name="a"),
            RowParallelLinear(14, 9, axis=axis, name="b", input_is_parallel=False),
            LayerNorm(14),
            RMSNorm(14, RmsFormula(1e-6)),
        ):
            with pytest.raises(ShapeError):
                layer(torch.tensor(2.0))
            layer(normal(3, 14)).sum().backward()
            assert all(parameter.grad is not None for parameter in layer.parameters())
        assert mse_loss(torch.tensor(3.0), torch.tensor(1.0)) == 4
        assert sum_all(torch.tensor(3.0)) == 3

    for degree in (1, 3):
        pool(degree, "threads").run(run)
