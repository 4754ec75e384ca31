"""Products of two activations whose contracted dim is cut by units.

Each matrix of a batch is multiplied by itself, for a batched product has other bits in another
batch (`numerics/matmul.py`). A batch that only one operand has is a matter of rows.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.errors import ShapeError
from shardproof.numerics.precision import node_dtype
from shardproof.numerics.summed_products import joined_nodes
from shardproof.ops.rows import without_autocast
from shardproof.ops.unit_linear import row
from shardproof.ops.unit_products import product_columns, product_rows
from shardproof.ops.unit_split import UnitSplit
from shardproof.ops.unit_sums import expand
from shardproof.tree import nodes_of_run


class _Contract(torch.autograd.Function):
    """One all_reduce of all products forward; local products backward, no Comm."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, place: UnitSplit) -> Tensor:
        ctx.place = place
        ctx.save_for_backward(a, b)
        if place.arithmetic.is_invariant:
            parts = _by_leaves(a, b, place)
        else:
            parts = [torch.bmm(place.owned.of(a, 2), place.owned.of(b, 1))]
        shape = (a.shape[0], a.shape[1], b.shape[2])
        return place.split.start_sum(parts, shape=shape, like=a, direction="forward").wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        place: UnitSplit = ctx.place
        place.axis.note(grad_y, who=place.who, what="gradient of the product")
        with without_autocast(grad_y):
            return _gradients(ctx, grad_y)


def _by_leaves(a: Tensor, b: Tensor, place: UnitSplit) -> list[Tensor]:
    """(B, M, N) for each node of this rank: the nodes of all matrices, to be sent at once."""
    pieces, shape = place.pieces, (a.shape[0], a.shape[1], b.shape[2])
    a, b = pieces.bring(a, 2), pieces.bring(b, 1)
    of_matrices = [
        joined_nodes(
            [(left, right)] * len(pieces.slices),
            pieces.slices,
            run=place.run,
            num_leaves=place.num_leaves,
        )
        for left, right in zip(a, b, strict=True)
    ]
    wide = node_dtype(a.dtype)
    return [
        torch.stack([each[node] for each in of_matrices])
        if of_matrices
        else a.new_zeros(shape, dtype=wide)
        for node in nodes_of_run(place.num_leaves, place.run)
    ]


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    place: UnitSplit = ctx.place
    a, b = ctx.saved_tensors
    needs_a, needs_b, _ = ctx.needs_input_grad
    grad_a = torch.empty_like(a, memory_format=torch.contiguous_format) if needs_a else None
    grad_b = torch.empty_like(b, memory_format=torch.contiguous_format) if needs_b else None
    for number, grad in enumerate(grad_y):
        if grad_a is not None:
            grad_a[number] = product_columns(grad, b[number].t(), place)
        if grad_b is not None:
            grad_b[number] = product_rows(a[number].t(), grad, place)
    return grad_a, grad_b, None


def contract(a: Tensor, b: Tensor, place: UnitSplit) -> Tensor:
    """`a @ b` where the contracted dim is cut: one all_reduce forward, local products backward.

    Args:
        a: (*, M, held), Shard(-1).
        b: (*, held, N), Shard(-2). Leading dims are whole and broadcast as in `torch.matmul`.
        place: of the contracted dim.
    Returns:
        (*, M, N), Replicate; its gradient is expected to be Replicate.
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: the operands do not fit each other, or are not what this rank holds.
    Comm:
        forward one all_reduce of (*, M, N); backward none.
    """
    is_fit = a.dim() >= 2 and b.dim() >= 2
    if not is_fit or a.shape[-1] != place.length or b.shape[-2] != place.length:
        raise ShapeError(
            f"{place.who} on {place.axis}: a (*, M, {place.length}) and b (*, {place.length}, N) "
            f"are what this rank holds, got shapes {tuple(a.shape)} and {tuple(b.shape)}. Give "
            "the parts that the place describes, with two dims or more."
        )
    if b.dim() == 2:
        return row(a, b, None, place, is_transposed=True)
    place.arithmetic.require()
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = expand(a, (*lead, *a.shape[-2:]), place)
    b = expand(b, (*lead, *b.shape[-2:]), place)
    y: Tensor = _Contract.apply(
        a.reshape(lead.numel(), *a.shape[-2:]), b.reshape(lead.numel(), *b.shape[-2:]), place
    )
    place.axis.note_result(y, who=place.who)
    return y.reshape(*lead, *y.shape[-2:])
