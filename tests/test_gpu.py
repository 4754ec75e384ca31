"""On a GPU: ranks as threads share one device, and products are called in leaf shape."""

import pytest
import torch

import shardproof as sp
from shardproof import comm

DEGREES = (1, 2, 3, 8)


def train(axis):
    """Outputs and gathered gradients of a block of odd widths after one backward."""
    column = sp.ColumnParallelLinear(37, 251, axis=axis, name="up", device="cuda")
    row = sp.RowParallelLinear(251, 9, axis=axis, name="down", device="cuda")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 37, generator=generator).cuda().requires_grad_()
    y = row(sp.functional.silu(column(x)))
    sp.functional.mse_loss(y, torch.zeros_like(y)).backward()
    grads = [
        comm.all_gather(
            layer.weight.grad,
            axis,
            dim=layer.layouts["weight"].dim,
            cut=layer.layouts["weight"].cut,
            direction="prover",
        )
        for layer in (column, row)
    ]
    return [tensor.detach().cpu() for tensor in (y, x.grad, row.bias.grad, *grads)]


@pytest.mark.gpu
def test_block_has_the_same_bits_at_every_degree_on_one_gpu():
    alone = sp.launch(train, degree=1)[0]

    for degree in DEGREES[1:]:
        for tensors in sp.launch(train, degree=degree):
            assert all(torch.equal(a, b) for a, b in zip(alone, tensors, strict=True))


@pytest.mark.gpu
def test_drawn_weights_are_those_of_the_cpu():
    def draw(axis, device):
        return sp.RowParallelLinear(40, 7, axis=axis, name="down", device=device).weight.cpu()

    on_cpu = sp.launch(lambda axis: draw(axis, "cpu").detach(), degree=3)
    on_gpu = sp.launch(lambda axis: draw(axis, "cuda").detach(), degree=3)

    assert all(torch.equal(a, b) for a, b in zip(on_cpu, on_gpu, strict=True))
