"""Products of shards: leaf partials added up to canonical nodes, and products that need no sum.

Our own kernels (`products`) serve every product in mode `core`, and small batches in the others.
In strict mode a product of a shard has the bits of the full product, so one call serves a whole
shard wherever nothing is summed over the cut dim. Elsewhere (*leafwise*) every call has one leaf's
shape and fresh, contiguous operands, so that the library cannot tell the degrees apart.
Plain tensors; no ranks, no autograd. Never `bmm`, `mv` or `dot`: their bits change with the cut.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardproof import batch_leaves, operators
from shardproof.batch_leaves import BatchLeaves
from shardproof.numerics import mode, products
from shardproof.numerics.precision import node_dtype
from shardproof.tree import Node, children, nodes_of_run, sum_leaves

# Bytes; torch's allocators give every tensor at least that. cuBLASLt picks a kernel by whether an
# address is a multiple of 256.
ALIGNMENT, ALIGNMENT_ON_GPU = 64, 256


def _fresh(x: Tensor) -> Tensor:
    """`x` with strides and alignment that do not depend on the shard it was cut from.

    A copy, unless it has them already: copies are contiguous and aligned too.
    """
    strides = (x.shape[1], 1) if x.dim() == 2 else (1,)  # torch calls others contiguous too
    if operators.is_recorded(x):  # what memory it will lie in is not known yet
        return x.clone(memory_format=torch.contiguous_format)
    alignment = ALIGNMENT_ON_GPU if x.is_cuda else ALIGNMENT
    if x.stride() == strides and x.data_ptr() % alignment == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def product_nodes(
    a: Tensor,
    b: Tensor,
    slices: Sequence[slice],
    *,
    run: range,
    num_leaves: int,
    is_transposed: bool = False,
) -> dict[Node, Tensor]:
    """Partial products of a run of leaves, added up to the largest canonical nodes.

    Args:
        a: (M, c), with c the owned part of the contracted dim.
        b: (c, N), or (N, c) if `is_transposed`: then `a @ b.T`.
        slices: where each owned leaf lies in c.
        run: the owned leaves.
        num_leaves: of the whole contracted dim.
        is_transposed: how `b` is given.
    Returns:
        Node -> (M, N), in `node_dtype`; every tensor is fresh.
    """
    if products.are_ours(a, b, a.shape[0]):
        return products.leaf_nodes(
            a, b, slices, run=run, num_leaves=num_leaves, is_transposed=is_transposed
        )
    b = b.t() if is_transposed else b
    leafwise = mode.is_leafwise(a.dtype, a.device)
    limit = 0 if leafwise else mode.addmm_limit(a.dtype)
    wide = node_dtype(a.dtype)

    def leaf(index: int) -> tuple[Tensor, Tensor]:
        where = slices[index - run.start]
        left, right = a[:, where], b[where]
        return fresh_operands(left, right) if leafwise else (left, right)

    def node_sum(node: Node) -> Tensor:
        if node[1] - node[0] == 1:
            left, right = leaf(node[0])
            return torch.mm(left, right).to(wide)
        first, rest = children(node)
        total = node_sum(first)
        if rest[1] - rest[0] == 1:
            left, right = leaf(rest[0])
            if left.shape[1] <= limit:
                return total.addmm_(left, right)
            return total.add_(torch.mm(left, right).to(wide))
        return total.add_(node_sum(rest))

    return {node: node_sum(node) for node in nodes_of_run(num_leaves, run)}


def product_sum(
    a: Tensor,
    b: Tensor,
    slices: Sequence[slice],
    bias: Tensor | None = None,
    *,
    is_transposed: bool = False,
) -> Tensor:
    """Partial products of all leaves, added up to the root, and the bias: one rank alone.

    Args:
        a: (M, K), whole.
        b: (K, N), or (N, K) if `is_transposed`: then `a @ b.T`.
        slices: where each leaf lies in K.
        bias: (N,) or None, added once, after the sum.
        is_transposed: how `b` is given.
    Returns:
        (M, N), fresh, in the dtype of `a`: rounded once, after the last addition.
    """
    if products.are_ours(a, b, a.shape[0]):
        return products.leaf_sum(a, b, slices, bias, is_transposed=is_transposed)
    leaves = len(slices)
    nodes = product_nodes(
        a,
        b,
        slices,
        run=range(leaves),
        num_leaves=leaves,
        is_transposed=is_transposed,
    )
    total = nodes[0, leaves].to(a.dtype)
    return total if bias is None else total.add_(bias)


def fresh_operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of one leaf's product, as torch's BLAS may see them in leafwise mode.

    Args:
        a: (M, K).
        b: (K, N).
    Returns:
        The same numbers, in strides and alignment that do not depend on the shard.
    """
    return _fresh(a), _fresh_operand(b)


def _fresh_operand(x: Tensor) -> Tensor:
    """As `_fresh`, but a transposed operand stays transposed."""
    return _fresh(x.t()).t() if x.stride(0) == 1 and x.stride(1) != 1 else _fresh(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, slices: Sequence[slice]) -> Tensor:
    """`x @ weight.T + bias`, where `weight` is cut along its rows and nothing is summed.

    Args:
        x: (M, K), whole.
        weight: (n, K), the owned rows.
        bias: (n,) or None.
        slices: where each owned leaf lies in n.
    Returns:
        (M, n).
    """
    if products.are_ours(x, weight, x.shape[0]):
        return products.product(x, weight, bias, is_transposed=True)
    if not mode.is_leafwise(x.dtype, x.device):
        return torch.nn.functional.linear(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    x = _fresh(x)
    for where in slices:
        leaf_bias = None if bias is None else _fresh(bias[where])
        y[:, where] = torch.nn.functional.linear(x, _fresh(weight[where]), leaf_bias)
    return y


def product_columns(
    a: Tensor, b: Tensor, slices: Sequence[slice], *, over_batch: bool = False
) -> Tensor:
    """`a @ b`, where `b` is cut along its columns and nothing is summed over that cut.

    Args:
        a: (M, K), whole.
        b: (K, n), the owned columns.
        slices: where each owned leaf lies in n.
        over_batch: K are the rows of a batch, which are summed by batch leaves.
    Returns:
        (M, n).
    """
    if over_batch and (batch := batch_leaves.several()) is not None:
        return _over_batch(product_columns, a, b, slices, batch, a.shape[0])
    if products.are_ours(a, b, a.shape[0]):
        return products.product(a, b)
    if not mode.is_leafwise(a.dtype, a.device):
        return torch.mm(a, b)
    y = a.new_empty(a.shape[0], b.shape[1])
    a = _fresh_operand(a)
    for where in slices:
        y[:, where] = torch.mm(a, _fresh(b[:, where]))
    return y


def product_rows(
    a: Tensor, b: Tensor, slices: Sequence[slice], *, over_batch: bool = False
) -> Tensor:
    """`a @ b`, where `a` is cut along its rows and nothing is summed over that cut.

    Args:
        a: (n, M), the owned rows.
        b: (M, K), whole.
        slices: where each owned leaf lies in n.
        over_batch: M are the rows of a batch, which are summed by batch leaves.
    Returns:
        (n, K).
    """
    if over_batch and (batch := batch_leaves.several()) is not None:
        return _over_batch(product_rows, a, b, slices, batch, mode.ANY_ROWS)
    if products.are_ours(a, b, mode.ANY_ROWS):  # its own are cut: they say nothing of the batch
        return products.product(a, b)
    if not mode.is_leafwise(a.dtype, a.device):
        return torch.mm(a, b)
    y = a.new_empty(a.shape[0], b.shape[1])
    b = _fresh(b)
    for where in slices:
        y[where] = torch.mm(_fresh_operand(a[where]), b)
    return y


def _over_batch(
    product: Callable[[Tensor, Tensor, Sequence[slice]], Tensor],
    a: Tensor,
    b: Tensor,
    slices: Sequence[slice],
    batch: BatchLeaves,
    rows: int,
) -> Tensor:
    """The products of the batch leaves, added by the tree; in one call where they are ours."""
    at = batch.row_slices(a.shape[1], "a weight gradient")
    if products.are_ours(a, b, rows):
        return products.leaf_sum(a, b, at)
    return sum_leaves(product(a[:, each], b[each], slices) for each in at)
