"""One matrix product per head, each by itself: what `bmm` would be if its bits could be trusted.

`bmm` picks its kernel by how many matrices there are, and that is what a cut along the heads
changes. Here every product has the shape of one head, so that nothing in it depends on how many
heads a rank has. Plain tensors; no ranks, no autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof import c_modules, operands, operators
from shardproof.numerics import matmul, products

_WHO = "a matrix product of heads (a @ b)"


def product_by_head(
    a: Tensor,
    b: Tensor,
    *,
    rows: int,
    serving: Sequence[int] | None = None,
    is_transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`a[n, h] @ b[n, serving[h]]` for every n and h.

    Args:
        a: (B, H, M, K), Shard(1).
        b: (B, G, K, N), or (B, G, N, K) if `is_transposed`: then `a @ b.T`.
        rows: queries in the whole batch, the same at every degree: few have another kernel.
        serving: which matrix of `b` serves each head of `a`; by default G is H, and its own.
        is_transposed: how `b` is given.
        out: (B, H, M, N), contiguous, to be written.
    Returns:
        (B, H, M, N), Shard(1): `out`, or a new tensor.
    """
    if is_transposed:
        b = b.transpose(2, 3)
    batch, heads, m, k = a.shape
    n = b.shape[3]
    if out is None:
        out = a.new_empty(batch, heads, m, n)
    if not out.numel():
        return out
    if not k:
        return out.zero_()
    served = range(heads) if serving is None else serving
    if products.are_ours(a, b, rows):
        _run_kernel(a, b, served, out)
        return out
    whole = (slice(0, n),)  # one leaf: a head is never cut
    for at in range(batch):
        for head, other in enumerate(served):
            out[at, head] = matmul.product_columns(a[at, head], b[at, other], whole)
    return out


def batched_product(
    a: Tensor,
    b: Tensor,
    *,
    rows: int,
    serving: Sequence[int] | None = None,
    is_transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`product_by_head` in one call, with bits that depend on how many heads there are (native).

    Args:
        a: as there, like all the others.
        b: (B, G, K, N), or (B, G, N, K) if `is_transposed`.
        rows: not needed here.
        serving: which matrix of `b` serves each head of `a`.
        is_transposed: how `b` is given.
        out: (B, H, M, N), contiguous, to be written.
    Returns:
        (B, H, M, N), Shard(1): `out`, or a new tensor.
    """
    if serving is not None and list(serving) != list(range(b.shape[1])):
        b = b[:, list(serving)]
    return torch.matmul(a, b.transpose(2, 3) if is_transposed else b, out=out)


def _run_kernel(a: Tensor, b: Tensor, serving: Sequence[int], out: Tensor) -> None:
    """All heads by our own kernel, which takes addresses: no view is made of any head."""
    if operators.is_recorded(a, b, out):
        out.copy_(_operator(a, b, list(serving)))
        return
    try:
        operands.check_freed(_WHO, a=a, b=b)
        if a.is_neg() or b.is_neg():  # a view whose memory has the opposite sign
            a, b = a.resolve_neg(), b.resolve_neg()
        _multiply(a, b, serving, out)
    except operands.ERRORS as error:
        operands.explain(error, _WHO, a=a, b=b, out=out)


@operators.define(
    "product_by_head(Tensor a, Tensor b, int[] serving) -> Tensor",
    lambda a, b, serving: a.new_empty(*a.shape[:3], b.shape[3]),
    lambda a, b, serving, out_val=None: 2 * out_val.numel() * a.shape[3],
)
def _operator(a: Tensor, b: Tensor, serving: list[int]) -> Tensor:
    """`_run_kernel` into a new tensor."""
    out = a.new_empty(*a.shape[:3], b.shape[3])
    _run_kernel(a, b, serving, out)
    return out


def _multiply(a: Tensor, b: Tensor, serving: Sequence[int], out: Tensor) -> None:
    kernels: Any = c_modules.kernels()
    run, threads, is_double = kernels.product, torch.get_num_threads(), a.dtype == torch.float64
    batch, _, m, k = a.shape
    n, size = b.shape[3], a.element_size()
    a_batch, a_head, *a_strides = a.stride()
    b_batch, b_head, *b_strides = b.stride()
    a_start, b_start, place = a.data_ptr(), b.data_ptr(), out.data_ptr()
    program, step = products.one_leaf(k), m * n * size
    for at in range(batch):
        for head, other in enumerate(serving):
            left = a_start + (at * a_batch + head * a_head) * size
            right = b_start + (at * b_batch + other * b_head) * size
            run(is_double, threads, place, m, n, k, left, *a_strides, right, *b_strides, 0, program)
            place += step
