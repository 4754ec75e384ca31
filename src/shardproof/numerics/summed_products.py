"""Products of several pairs of operands, added up: one contraction whose steps lie in many tensors.

`a1 @ b1 + a2 @ b2 + ...`, leaf by leaf: a leaf has some steps of each pair, or none. Its partial is
the sum of its products, the pairs from left to right, and leaves are added by the canonical tree.
So the order does not depend on how many leaves a rank owns. Our kernel reads the operands where
they lie; elsewhere each product is one call, and in *leafwise* mode its operands are copies.
Plain tensors; no ranks, no autograd.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof import c_modules, observing, operands, operators
from shardproof.errors import ShapeError
from shardproof.numerics import mode, products
from shardproof.numerics.matmul import fresh_operands
from shardproof.numerics.precision import node_dtype, widen
from shardproof.tree import Node, children, nodes_of_run

Pairs = Sequence[tuple[Tensor, Tensor]]
Slices = Sequence[tuple[slice, ...]]

_CACHE_SIZE = 1024
_WHO = "a sum of matrix products (a @ b)"


class _Program:
    """What our kernel is to do.

    Attributes:
        nodes: that come out, and for each the pieces of its leaves, packed; steps are counted over
            the spans of all pairs.
        spans: for each pair, from where to where it is read; empty if it is not.
    """

    def __init__(self, slices: Slices, run: range, num_leaves: int) -> None:
        self.spans = [_span(each) for each in slices]
        firsts = [0]
        for span in self.spans:
            firsts.append(firsts[-1] + len(span))
        self._pieces = [
            [
                (at.start - span.start + first, at.stop - span.start + first)
                for at, span, first in zip(places, self.spans, firsts, strict=False)
                if at.start < at.stop
            ]
            for places in zip(*slices, strict=True)
        ]
        self._start = run.start
        self._packed: list[bytes] = []
        self.nodes: dict[Node, bytes] = {}
        for node in nodes_of_run(num_leaves, run):
            self._packed.clear()
            self._visit(node, 0, True)
            self.nodes[node] = b"".join(self._packed)

    def _visit(self, node: Node, pops: int, is_last: bool) -> None:
        """Leaves left to right; after its last piece, a last child adds the sums to its left."""
        if node[1] - node[0] > 1:
            left, right = children(node)
            self._visit(left, 0, False)
            self._visit(right, pops + 1, is_last)
            return
        pieces = self._pieces[node[0] - self._start]
        for number, (start, stop) in enumerate(pieces):
            ends = number == len(pieces) - 1
            adds = (number > 0) + (pops if ends else 0)
            self._packed.append(struct.pack("=4q", start, stop, adds, is_last and ends))


# By the identity of the slices, which an entry keeps alive: a slice has no hash before Python 3.12.
_programs: dict[tuple[int, ...], tuple[Slices, _Program]] = {}


def joined_nodes(
    pairs: Pairs, slices: Slices, *, run: range, num_leaves: int
) -> dict[Node, Tensor]:
    """Partial sums over all pairs of a run of leaves, added up to the largest canonical nodes.

    Args:
        pairs: (M, c_i) and (c_i, N) each; one or more, all of one dtype and device.
        slices: for each pair, where its steps of each owned leaf lie in c_i; empty where a leaf
            has none of it.
        run: the owned leaves.
        num_leaves: of the whole contraction.
    Returns:
        Node -> (M, N), in `node_dtype`; every tensor is fresh.

    Raises:
        ShapeError: the sizes of two pairs, or of one, do not agree.
    """
    _check(pairs)
    is_ours = all(products.are_ours(a, b, a.shape[0]) for a, b in pairs)
    leaves = zip(*slices, strict=True)
    if is_ours and all(any(at.start < at.stop for at in leaf) for leaf in leaves):
        return kernel_nodes(pairs, slices, run, num_leaves)
    leaf = _Leaf(pairs, slices, run, is_ours)

    def node_sum(node: Node) -> Tensor:
        if node[1] - node[0] == 1:
            return leaf.partial(node[0])
        left, right = children(node)
        return node_sum(left).add_(node_sum(right))

    return {node: node_sum(node) for node in nodes_of_run(num_leaves, run)}


class _Leaf:
    """Partials of one leaf each, by calls for one product each."""

    def __init__(self, pairs: Pairs, slices: Slices, run: range, is_ours: bool) -> None:
        a, b = pairs[0]
        self._pairs, self._slices, self._first = pairs, slices, run.start
        self._shape, self._like = (a.shape[0], b.shape[1]), a
        self._wide = node_dtype(a.dtype)
        self._limit = 0
        self._product: Callable[[Tensor, Tensor], Tensor] = products.product
        if not is_ours and mode.is_leafwise(a.dtype, a.device):
            self._product = _leafwise_product
        elif not is_ours:
            self._product, self._limit = torch.mm, mode.addmm_limit(a.dtype)

    def partial(self, index: int) -> Tensor:
        """The sum of a leaf's products: (M, N), fresh."""
        places = (each[index - self._first] for each in self._slices)
        parts = [
            (a[:, at], b[at])
            for (a, b), at in zip(self._pairs, places, strict=True)
            if at.start < at.stop
        ]
        if not parts:
            return self._like.new_zeros(self._shape, dtype=self._wide)
        total = self._product(*parts[0])
        for a, b in parts[1:]:
            if a.shape[1] <= self._limit:
                total.addmm_(a, b)
            else:
                total.add_(self._product(a, b))
        return total


def _leafwise_product(a: Tensor, b: Tensor) -> Tensor:
    """(M, N), in `node_dtype`. All pairs in one call would need copies side by side: too large."""
    return widen(torch.mm(*fresh_operands(a, b)))


def kernel_nodes(pairs: Pairs, slices: Slices, run: range, num_leaves: int) -> dict[Node, Tensor]:
    """`joined_nodes` by our kernel, of leaves none of which is empty.

    Args:
        pairs: as there; fp32 or fp64 on the CPU.
        slices: as there.
        run: as there.
        num_leaves: as there.
    Returns:
        Node -> (M, N), each a fresh tensor of its own.
    """
    if operators.is_recorded(*(x for pair in pairs for x in pair)):
        return _recorded(pairs, slices, run, num_leaves)
    program = _program(slices, run, num_leaves)
    a, b = pairs[0]
    m, n = a.shape[0], b.shape[1]
    sums = {node: a.new_empty(m, n) for node in program.nodes}
    if not (m and n):
        return sums
    try:
        for x, y in pairs:
            operands.check_freed(_WHO, a=x, b=y)
        read = [
            (x.resolve_neg(), y.resolve_neg(), span)
            for (x, y), span in zip(pairs, program.spans, strict=True)
            if span
        ]
        terms = b"".join(_term(x, y, span) for x, y, span in read)
        is_double, threads = a.dtype is torch.float64, torch.get_num_threads()
        for node, out in sums.items():
            _kernel()(is_double, threads, out.data_ptr(), m, n, terms, program.nodes[node])
    except operands.ERRORS as error:
        for x, y in pairs[1:]:
            operands.check(_WHO, a=x, b=y)
        operands.explain(error, _WHO, a=a, b=b)
    if observing.is_on():
        observing.tell_kernel(2 * m * n * sum(_length(places) for places in slices))
    return sums


def _recorded(pairs: Pairs, slices: Slices, run: range, num_leaves: int) -> dict[Node, Tensor]:
    """`kernel_nodes`, called as an operator."""
    bounds = [bound for each in slices for at in each for bound in (at.start, at.stop)]
    left, right = zip(*pairs, strict=True)
    sums = _operator(left, right, bounds, [run.start, run.stop, num_leaves])
    return dict(zip(nodes_of_run(num_leaves, run), sums, strict=True))


def _fake(
    left: list[Tensor], right: list[Tensor], bounds: list[int], leaves: list[int]
) -> list[Tensor]:
    start, stop, num_leaves = leaves
    a, b = left[0], right[0]
    return [
        a.new_empty(a.shape[0], b.shape[1]) for _ in nodes_of_run(num_leaves, range(start, stop))
    ]


def _flops(
    left: list[Tensor],
    right: list[Tensor],
    bounds: list[int],
    leaves: list[int],
    out_val: Any = None,
) -> int:
    steps = sum(bounds[1::2]) - sum(bounds[::2])
    return 2 * left[0].shape[0] * right[0].shape[1] * steps


@operators.define(
    "product_sums(Tensor[] left, Tensor[] right, int[] bounds, int[] leaves) -> Tensor[]",
    _fake,
    _flops,
)
def _operator(
    left: list[Tensor], right: list[Tensor], bounds: list[int], leaves: list[int]
) -> list[Tensor]:
    """`kernel_nodes`, of slices and leaves in numbers."""
    start, stop, num_leaves = leaves
    places = [slice(*bounds[at : at + 2]) for at in range(0, len(bounds), 2)]
    count = stop - start  # a rank without leaves has pairs all the same
    slices = tuple(tuple(places[at * count : (at + 1) * count]) for at in range(len(left)))
    pairs = list(zip(left, right, strict=True))
    return list(kernel_nodes(pairs, slices, range(start, stop), num_leaves).values())


def _term(a: Tensor, b: Tensor, span: range) -> bytes:
    """One pair as the kernel takes it: the span alone."""
    (a_row, a_col), (b_row, b_col), size = a.stride(), b.stride(), a.element_size()
    a_start = a.data_ptr() + span.start * a_col * size
    b_start = b.data_ptr() + span.start * b_row * size
    return struct.pack("=7q", len(span), a_start, a_row, a_col, b_start, b_row, b_col)


def _length(places: Sequence[slice]) -> int:
    """Steps that are read."""
    return sum(at.stop - at.start for at in places)


def _span(places: Sequence[slice]) -> range:
    """From the first step that is read to the last."""
    read = [at for at in places if at.start < at.stop]
    return range(min(at.start for at in read), max(at.stop for at in read)) if read else range(0)


def _program(slices: Slices, run: range, num_leaves: int) -> _Program:
    key = (*map(id, slices), run.start, num_leaves)
    entry = _programs.get(key)
    if entry is not None:
        return entry[1]
    if len(_programs) >= _CACHE_SIZE:
        _programs.clear()
    program = _Program(slices, run, num_leaves)
    if all(isinstance(each, tuple) for each in slices):  # what could change is not kept
        _programs[key] = (tuple(slices), program)
    return program


@functools.cache
def _kernel() -> Callable[..., None]:
    """The C module. Call this only if `mode` found it."""
    kernels: Any = c_modules.kernels()
    return kernels.joined


def _check(pairs: Pairs) -> None:
    rows, columns, dtype = pairs[0][0].shape[0], pairs[0][1].shape[1], pairs[0][0].dtype
    for a, b in pairs:
        is_alike = a.dtype is dtype and b.dtype is dtype
        if not is_alike or (*a.shape, columns) != (rows, *b.shape):
            raise ShapeError(
                f"cannot add the product of {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} "
                f"{b.dtype} to one of shape ({rows}, {columns}) {dtype}. Give pairs that agree "
                "along the contracted dim, with the same rows, columns and dtype."
            )
