"""Products by our own kernels: the order of additions is written down, not found out.

The order: leaves, each cut into blocks of 256 steps; a block is one chain of fused multiply-adds
from zero; blocks are added left to right, leaves by the canonical tree. So an element depends on
its own row and column alone: no cut, batch, stride, thread count or vector width can change it.
The kernels are C (csrc/kernels); `mode` says when they are used. CPU, fp32 and fp64.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from shardproof import c_modules, observing, operands, operators
from shardproof.errors import ShapeError
from shardproof.numerics import mode
from shardproof.tree import Node, children, nodes_of_run

_IS_DOUBLE = {torch.float32: 0, torch.float64: 1}
_CACHE_SIZE = 1024
_WHO = "a matrix product (a @ b + bias)"

Program = tuple[tuple[Node, bytes], ...]  # for each node, the leaves that are added up to it

# By the identity of the slices, which an entry keeps alive: a slice has no hash before Python 3.12.
_programs: dict[tuple[int, int, int], tuple[Sequence[slice], Program]] = {}


def are_ours(a: Tensor, b: Tensor, rows: int) -> bool:
    """True if the kernels multiply `a` and `b`, in a product of `rows` rows in the whole batch."""
    return (
        rows <= mode.own_rows()
        and a.is_cpu
        and b.is_cpu
        and a.dtype in _IS_DOUBLE
        and a.dtype is b.dtype
    )


def product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, is_transposed: bool = False
) -> Tensor:
    """`a @ b + bias`, contracted in one leaf.

    Args:
        a: (M, K).
        b: (K, N), or (N, K) if `is_transposed`: then `a @ b.T`.
        bias: (N,) or None, added last.
        is_transposed: how `b` is given.
    Returns:
        (M, N).

    Raises:
        ShapeError: sizes, or the bias's dtype, do not fit.
    """
    return _run(a, b, bias, one_leaf(a.shape[1]), is_transposed)


def leaf_sum(
    a: Tensor,
    b: Tensor,
    slices: Sequence[slice],
    bias: Tensor | None = None,
    *,
    is_transposed: bool = False,
) -> Tensor:
    """`a @ b + bias`, the leaf products added up to the root.

    Args:
        a: (M, K), whole.
        b: (K, N), or (N, K) if `is_transposed`.
        slices: where each leaf lies in K.
        bias: (N,) or None, added last.
        is_transposed: how `b` is given.
    Returns:
        (M, N).

    Raises:
        ShapeError: sizes, or the bias's dtype, do not fit.
    """
    leaves = len(slices)
    ((_, packed),) = _program(slices, range(leaves), leaves)
    return _run(a, b, bias, packed, is_transposed)


def leaf_nodes(
    a: Tensor,
    b: Tensor,
    slices: Sequence[slice],
    *,
    run: range,
    num_leaves: int,
    is_transposed: bool = False,
) -> dict[Node, Tensor]:
    """`a @ b`, the products of a run of leaves added up to the largest canonical nodes.

    Args:
        a: (M, c), with c the owned part of the contracted dim.
        b: (c, N), or (N, c) if `is_transposed`.
        slices: where each owned leaf lies in c.
        run: the owned leaves.
        num_leaves: of the whole contracted dim.
        is_transposed: how `b` is given.
    Returns:
        Node -> (M, N), each a tensor of its own; none if the rank is idle.
    """
    return {
        node: _run(a, b, None, packed, is_transposed)
        for node, packed in _program(slices, run, num_leaves)
    }


def _run(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    program: bytes,
    is_transposed: bool,
) -> Tensor:
    m, k = a.shape
    if is_transposed:
        n, inner = b.shape
    else:
        inner, n = b.shape
    if inner != k:
        _refuse_sizes(m, k, inner, n)
    if bias is not None and (bias.shape != (n,) or bias.dtype is not a.dtype):
        _refuse_bias(bias, a, m, n)
    if operators.is_recorded(a, b, bias):
        return _recorded(a, b, bias, program, is_transposed)
    out = a.new_empty(m, n)
    if not (m and n and k):
        out.zero_()
        return out if bias is None else out.add_(bias)
    try:
        if a.storage_offset() or b.storage_offset():
            operands.check_freed(_WHO, a=a, b=b)
        if a.is_neg() or b.is_neg():  # a view whose memory has the opposite sign
            a, b = a.resolve_neg(), b.resolve_neg()
        bias_address = 0
        if bias is not None:
            if bias.storage_offset():
                operands.check_freed(_WHO, bias=bias)
            bias = bias.resolve_neg().contiguous()
            bias_address = bias.data_ptr()
            if not bias_address:  # which would mean that there is none
                operands.check(_WHO, bias=bias)
        b_row, b_col = b.stride()
        if is_transposed:
            b_row, b_col = b_col, b_row
        _kernel()(
            _IS_DOUBLE[a.dtype],
            torch.get_num_threads(),
            out.data_ptr(),
            m,
            n,
            k,
            a.data_ptr(),
            *a.stride(),
            b.data_ptr(),
            b_row,
            b_col,
            bias_address,
            program,
        )
    except operands.ERRORS as error:
        operands.explain(error, _WHO, a=a, b=b, bias=bias, out=out)
    if observing.is_on():
        steps = sum(stop - start for start, stop, _, _ in struct.iter_unpack("=4q", program))
        observing.tell_kernel(2 * m * n * steps)
    return out


def _recorded(
    a: Tensor, b: Tensor, bias: Tensor | None, program: bytes, is_transposed: bool
) -> Tensor:
    """`_run`, called as an operator."""
    steps = [step for each in struct.iter_unpack("=4q", program) for step in each]
    result: Tensor = _operator(a, b, bias, steps, is_transposed)
    return result


def _fake(
    a: Tensor, b: Tensor, bias: Tensor | None, program: list[int], is_transposed: bool
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0 if is_transposed else 1])


def _flops(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    program: list[int],
    is_transposed: bool,
    out_val: Any = None,
) -> int:
    steps = sum(program[1::4]) - sum(program[::4])
    return 2 * out_val.numel() * steps


@operators.define(
    "product(Tensor a, Tensor b, Tensor? bias, int[] program, bool is_transposed) -> Tensor",
    _fake,
    _flops,
)
def _operator(
    a: Tensor, b: Tensor, bias: Tensor | None, program: list[int], is_transposed: bool
) -> Tensor:
    """`_run`, of a program in numbers."""
    return _run(a, b, bias, struct.pack(f"={len(program)}q", *program), is_transposed)


def _refuse_sizes(m: int, k: int, inner: int, n: int) -> NoReturn:
    raise ShapeError(
        f"cannot multiply ({m}, {k}) by ({inner}, {n}): {k} is not {inner}. Give operands that "
        "agree along the contracted dim."
    )


def _refuse_bias(bias: Tensor, a: Tensor, m: int, n: int) -> NoReturn:
    raise ShapeError(
        f"the bias is {bias.dtype} of shape {tuple(bias.shape)}, and a product of shape "
        f"({m}, {n}) needs {a.dtype} of shape ({n},). Give one element for each column."
    )


@functools.cache
def _kernel() -> Callable[..., None]:
    """The C module. Call this only if `mode` found it."""
    kernels: Any = c_modules.kernels()
    return kernels.product


@functools.lru_cache(_CACHE_SIZE)
def one_leaf(size: int) -> bytes:
    """What the kernel is to do: contract all of `size` in one leaf, and that is the result."""
    return _packed((0, size, 0, 1))


def _packed(*leaves: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("=4q", *leaf) for leaf in leaves)


def _program(slices: Sequence[slice], run: range, num_leaves: int) -> Program:
    """What the kernel is to do for a run of leaves."""
    key = (id(slices), run.start, num_leaves)
    entry = _programs.get(key)
    if entry is not None and entry[0] is slices:
        return entry[1]
    if len(_programs) >= _CACHE_SIZE:
        _programs.clear()
    program = _build_program(slices, run, num_leaves)
    if isinstance(slices, tuple):  # what could change is not kept
        _programs[key] = (slices, program)
    return program


def _build_program(slices: Sequence[slice], run: range, num_leaves: int) -> Program:
    def visit(node: Node, pops: int, is_last: bool) -> None:
        """Leaves left to right; after its leaf, a last child adds the sums to its left."""
        if node[1] - node[0] == 1:
            where = slices[node[0] - run.start]
            leaves.append((where.start, where.stop, pops, is_last))
            return
        left, right = children(node)
        visit(left, 0, False)
        visit(right, pops + 1, is_last)

    nodes = []
    for node in nodes_of_run(num_leaves, run):
        leaves: list[tuple[int, int, int, int]] = []
        visit(node, 0, True)
        nodes.append((node, _packed(*leaves)))
    return tuple(nodes)
