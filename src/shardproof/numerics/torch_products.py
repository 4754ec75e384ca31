"""Matrix products whose bits depend on the contracted dim alone, with torch's names and arguments.

Every product is one of our own kernels (`products`), whatever its size: so an element depends on
its row and its column, and a slice along rows, columns or batch has the bits of the whole. Where
the kernels were not built, each matrix is one call of torch's BLAS (`matmul.product_columns`):
in *leafwise* mode that serves a cut along the batch alone.

bf16 and fp16 are multiplied in fp32 and rounded once. Backward, what is contracted (over columns
for the left operand, over rows for the right one) is one product too. Plain tensors; no ranks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import ShapeError
from shardproof.numerics import products
from shardproof.numerics.batched_products import product_by_head
from shardproof.numerics.broadcasting import broadcast
from shardproof.numerics.dim_sums import expand, total
from shardproof.numerics.precision import widen

add = broadcast(torch.add)
mul = broadcast(torch.mul)

_OURS = 1  # as many rows have a kernel of ours wherever there is one


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of matrices with the same leading dims.

    Args:
        a: (*, M, K), Replicate along K.
        b: (*, K, N), Replicate along K.
    Returns:
        (*, M, N); its gradient may be differentiated.
    Raises:
        ShapeError: the leading dims or the contracted ones differ.
    """
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ShapeError(
            f"cannot multiply {tuple(a.shape)} by {tuple(b.shape)}: (*, M, K) and (*, K, N) "
            "wanted, with the same leading dims."
        )
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Contraction.apply(a, b)
    return _multiply(a, b)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """`torch.matmul`: vectors, matrices, and leading dims that are broadcast.

    Args:
        input: (*, M, K) or (K,), Replicate along K.
        other: (*, K, N) or (K,), Replicate along K.
    Returns:
        (*, M, N), without the dims that a vector lacks.
    Raises:
        ShapeError: the dims do not fit each other.
    """
    if not input.dim() or not other.dim():
        raise ShapeError("matmul takes a vector or a matrix, got a number. Use input * other.")
    if input.dim() == 1:
        return matmul(input[None], other).squeeze(0 if other.dim() == 1 else -2)
    if other.dim() == 1:
        return matmul(input, other[:, None]).squeeze(-1)
    if other.dim() == 2:  # all rows of all matrices in one product
        rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
        return batched_product(rows, other).reshape(*input.shape[:-1], other.shape[1])
    if input.dim() == 2:
        return matmul(other.mT, input.mT).mT
    lead = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    a = expand(input, [*lead, *input.shape[-2:]])
    return batched_product(a, expand(other, [*lead, *other.shape[-2:]]))


def reversed_matmul(input: Tensor, other: Tensor) -> Tensor:
    """`other @ input`.

    Args:
        input: (*, K, N) or (K,), Replicate along K.
        other: (*, M, K) or (K,), Replicate along K.
    Returns:
        as of `matmul`.
    """
    return matmul(other, input)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input @ weight.T + bias`.

    Args:
        input: (*, K), Replicate along K.
        weight: (N, K) or (K,), Replicate along K.
        bias: (N,) or (), as the rows of `weight` are cut, or None.
    Returns:
        (*, N), or (*) of a weight without rows.
    """
    y = matmul(input, weight if weight.dim() == 1 else weight.t())
    return y if bias is None else add(y, bias)


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Tensor:
    """`beta * input + alpha * (mat1 @ mat2)`; `addmv` and `baddbmm` too.

    Args:
        input: broadcasts with the product.
        mat1: (*, M, K), Replicate along K.
        mat2: (*, K, N) or (K,), Replicate along K.
        beta: a number; 0 leaves `input` out, NaN and all.
        alpha: a number.
        out: None.
    Returns:
        (*, M, N), or (*, M).
    """
    product = matmul(mat1, mat2)
    if alpha != 1:
        product = product * alpha
    if beta == 0:
        return product
    return add(input if beta == 1 else input * beta, product)


def addbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Tensor:
    """`beta * input + alpha * sum(batch1 @ batch2)`.

    Args:
        input: broadcasts with the sum.
        batch1: (B, M, K), Replicate along B and K.
        batch2: (B, K, N), Replicate along B and K.
        beta: a number; 0 leaves `input` out, NaN and all.
        alpha: a number.
        out: None.
    Returns:
        (M, N).
    """
    product = total(batched_product(batch1, batch2), 0)
    if alpha != 1:
        product = product * alpha
    if beta == 0:
        return product
    return add(input if beta == 1 else input * beta, product)


def outer(input: Tensor, vec2: Tensor, *, out: Any = None) -> Tensor:
    """Every element times every other.

    Args:
        input: (M,), Replicate or Shard(0).
        vec2: (N,), Replicate or Shard(0).
        out: None.
    Returns:
        (M, N).
    """
    return mul(input[:, None], vec2[None])


def inner(input: Tensor, other: Tensor, *, out: Any = None) -> Tensor:
    """`input @ other.T` over the last dims.

    Args:
        input: (*, K), Replicate along K.
        other: (*, K), Replicate along K.
        out: None.
    Returns:
        the leading dims of both, one behind the other.
    """
    if not input.dim() or not other.dim():
        return mul(input, other)
    rows = other.reshape(math.prod(other.shape[:-1]), other.shape[-1])
    return matmul(input, rows.t()).reshape(*input.shape[:-1], *other.shape[:-1])


def contracted_dims(of_a: int, of_b: int, dims: Any) -> tuple[list[int], list[int]]:
    """The dims that `torch.tensordot` contracts, of both operands, counted from the left.

    Args:
        of_a: how many dims the first operand has.
        of_b: likewise, the second.
        dims: as `tensordot` takes it.
    Raises:
        ShapeError: a dim is not there, or the numbers of dims differ.
    """
    if isinstance(dims, int):
        left, right = list(range(of_a - dims, of_a)), list(range(dims))
    else:
        left, right = [[each] if isinstance(each, int) else list(each) for each in dims]
    for sides, count in ((left, of_a), (right, of_b)):
        wrong = [each for each in sides if not -count <= each < count]
        if wrong or len(left) != len(right) or len(sides) > count:
            raise ShapeError(
                f"tensordot contracts dims {left} of a tensor of {of_a} dims with {right} of one "
                f"of {of_b}. Give as many of each, and only dims that are there."
            )
    return [each % of_a for each in left], [each % of_b for each in right]


def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Any = None) -> Tensor:
    """A product over dims of both.

    Args:
        a: (*), Replicate along the contracted dims.
        b: (*), Replicate along the contracted dims.
        dims: how many, the last of `a` and the first of `b`; or two lists of dims.
        out: None.
    Returns:
        the other dims of both, one behind the other.
    """
    left, right = contracted_dims(a.dim(), b.dim(), dims)
    free_a = [d for d in range(a.dim()) if d not in left]
    free_b = [d for d in range(b.dim()) if d not in right]
    inside = math.prod(a.shape[d] for d in left)
    rows = [a.shape[d] for d in free_a]
    columns = [b.shape[d] for d in free_b]
    x = a.permute(*free_a, *left).reshape(math.prod(rows), inside)
    y = b.permute(*right, *free_b).reshape(inside, math.prod(columns))
    return batched_product(x, y).reshape(*rows, *columns)


def vecdot(x: Tensor, y: Tensor, *, dim: int = -1, out: Any = None) -> Tensor:
    """Sum of products along a dim.

    Args:
        x: (*), Replicate along `dim`.
        y: broadcasts with `x`, Replicate along `dim`.
        dim: along which.
        out: None.
    Returns:
        (*), without `dim`.
    """
    return total(mul(widen(x), widen(y)), dim).to(torch.result_type(x, y))


class _Contraction(torch.autograd.Function):
    """`a @ b` forward, `g @ b.T` and `a.T @ g` backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        needs_a, needs_b = ctx.needs_input_grad
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
        return _multiply(a, b).data  # no view, or torch would refuse to write to it in place

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad_a = None if b is None else batched_product(grad_y, b.mT)
        return grad_a, None if a is None else batched_product(a.mT, grad_y)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    if a.is_meta or not a.is_floating_point():
        return torch.matmul(a, b)
    dtype = a.dtype
    if dtype is not b.dtype:
        raise ShapeError(f"cannot multiply {dtype} by {b.dtype}. Cast one of them.")
    if a.dim() == 2 and products.are_ours(a, b, _OURS):
        return products.product(a, b)
    shape = (*a.shape[:-1], b.shape[-1])
    a, b = (_four_dims(widen(x)) for x in (a, b))
    y = product_by_head(a, b, rows=_OURS)
    # Not a view of what nobody sees: such a result of an autograd function cannot be written to.
    return torch.ops.aten._unsafe_view(y, shape).to(dtype)


def _four_dims(x: Tensor) -> Tensor:
    """(*, M, N) to (B, H, M, N)."""
    if x.dim() > 4:
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    return x[(None,) * (4 - x.dim())]
