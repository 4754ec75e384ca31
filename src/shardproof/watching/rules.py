"""Watching rules by kind of operation: which labels meet, and what would be communicated.

A rule takes (operation, arguments, named arguments, outputs, record) and returns the factors of
each output. An operation without a rule needs whole operands, and is counted by name.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from shardproof.watching.atoms import Labels
from shardproof.watching.factors import Factors, Operand, combine, reduce_lines, varying
from shardproof.watching.kinds import LIKE_SUMS, LINES, name_of
from shardproof.watching.labelled import Labelled, factors_of, parameter_of
from shardproof.watching.record import Record

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any], list[Tensor], Record], list[Factors]]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operations."""

    def put(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        return function

    return put


def labelled(tree: Any) -> list[Labelled]:
    """All labelled tensors among arguments."""
    return [each for each in tree_leaves(tree) if isinstance(each, Labelled)]


def see_all(tree: Any, op: str, record: Record) -> None:
    """Record that an operation needs all of its operands whole."""
    for each in labelled(tree):
        for factor in each.factors:
            record.see("gather", op, factor, each.parameter)


def whole_along(
    x: Any, dims: Iterable[int], op: str, record: Record, *, what: str = "gather"
) -> list[Labels]:
    """The factors that remain when an operation needs all elements along `dims`."""
    whole_factors = []
    for factor in factors_of(x):
        hit = {dim % factor.ndim for dim in dims} & set(varying(factor)) if factor.ndim else set()
        if not hit:
            whole_factors.append(factor)
        elif set(varying(factor)) - hit:
            whole_factors.append(reduce_lines(factor, tuple(hit), record))
        else:
            record.see(what, op, factor, x.parameter)
    return [factor for factor in whole_factors if factor.any()]


def dims_of(args: tuple[Any, ...], kwargs: dict[str, Any], where: int, ndim: int) -> list[int]:
    """The dims in the arguments of an operation; all dims, if there are none."""
    argument = args[where] if len(args) > where else kwargs.get("dim")
    if (
        argument is None
        or isinstance(argument, bool)
        or (isinstance(argument, list | tuple) and not argument)
    ):
        return list(range(ndim))
    return [
        dim % max(ndim, 1)
        for dim in (argument if isinstance(argument, list | tuple) else (argument,))
    ]


def without(factors: list[Labels], dims: list[int], x: Tensor, out: Tensor) -> Factors:
    """Factors of a result in which the reduced dims have size 1 or were removed."""
    if out.dim() == x.dim():
        return tuple(factors)
    removed_dims = tuple(sorted(set(dims)))
    if out.dim() != x.dim() - len(removed_dims):
        return ()
    return tuple(factor.squeeze(removed_dims) for factor in factors)


@rule("kind:new")
def _new(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    return [() for _ in outs]


def aligned(factor: Labels, ndim: int) -> Labels:
    """A factor with leading dims of size 1, so that it has `ndim` dims."""
    return factor.reshape((1,) * (ndim - factor.ndim) + factor.shape)


@rule("kind:pointwise")
def pointwise(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Element-wise operations: elements at the same position meet."""
    name, shape = name_of(func), tuple(outs[0].shape)
    operands: list[Operand] = []
    sources = labelled((args, kwargs))
    if name == "copy_":
        sources = [each for each in sources if each is not args[0]]
    for each in sources:
        for factor in each.factors:
            if factor.ndim <= len(shape):
                fitted = aligned(factor, len(shape))
                if all(a in (1, b) for a, b in zip(fitted.shape, shape, strict=True)):
                    operands.append((fitted, each.parameter is not None))
                    continue
            record.see("gather", name, factor, each.parameter)
    combined = combine(operands, name, record)
    return [tuple(f for f in combined if f.ndim == out.dim()) for out in outs]


@rule("kind:lines")
def lines(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Operations that need all elements along some dims, such as softmax."""
    name, x = name_of(func), args[0]
    if name in ("max", "min", "median") and len(args) > 1 and isinstance(args[1], Tensor):
        return pointwise(func, args, kwargs, outs, record)
    where = LINES[name]
    has_default = name in ("topk", "sort", "argsort", "kthvalue", "mode", "median")
    if has_default and func._overloadname not in ("default",) and "dim" not in kwargs:
        has_default = len(args) <= where + (func._overloadname == "stable")
    if has_default and len(args) <= where and "dim" not in kwargs:
        dims = [x.dim() - 1] if name != "median" or len(outs) > 1 else list(range(x.dim()))
    else:
        dims = dims_of(args, kwargs, where, x.dim())
    what = "sum" if name in LIKE_SUMS else "gather"
    whole_factors = whole_along(x, dims, name, record, what=what)
    return [without(whole_factors, dims, x, out) for out in outs]


@rule("kind:sum")
def sums(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Sums along some dims."""
    x = args[0]
    dims = dims_of(args, kwargs, 1, x.dim())
    whole_factors = whole_along(x, dims, name_of(func), record, what="sum")
    return [without(whole_factors, dims, x, outs[0])]


@rule("glu")
def glu(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """The first half of a dim times the sigmoid of the second."""
    x = args[0]
    dim = dims_of(args, kwargs, 1, x.dim())[0] if len(args) > 1 or kwargs else x.dim() - 1
    operands: list[Operand] = []
    for factor in x.factors:
        halves = np.split(factor, 2, axis=dim) if factor.shape[dim] > 1 else [factor]
        operands += [(half, x.parameter is not None) for half in halves]
    return [combine(operands, "glu", record)]


@rule("as_strided_")
def restride(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """`as_strided_`: other strides for the same elements."""
    if outs[0].shape == args[0].shape:
        return [args[0].factors]
    see_all(args, "as_strided_", record)
    return [()]


@rule("im2col")
def patches(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """`im2col`: images (*, channels, height, width) to (*, channels * window, positions)."""
    x = args[0]
    whole_factors = whole_along(x, (-1, -2), "im2col", record)
    times = outs[0].shape[-2] // x.shape[-3]
    return [tuple(np.repeat(factor.squeeze(-1), times, -2) for factor in whole_factors)]


@rule(
    "nll_loss_forward nll_loss2d_forward _local_scalar_dense equal nonzero _cdist_forward"
    " searchsorted bucketize histc bincount _ctc_loss arange scalar_tensor _unique2 unique_dim"
    " unique_consecutive masked_select is_nonzero"
)
def whole(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Operations that need all elements of their operands."""
    see_all((args, kwargs), name_of(func), record)
    return [() for _ in outs]


@rule(
    "upsample_bicubic2d upsample_bilinear2d upsample_nearest2d _upsample_bicubic2d_aa avg_pool1d"
    " upsample_nearest1d upsample_linear1d _upsample_bilinear2d_aa _upsample_nearest_exact2d"
    " upsample_trilinear3d upsample_nearest3d max_pool2d_with_indices max_pool3d_with_indices"
    " avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d"
    " adaptive_max_pool3d grid_sampler_2d grid_sampler_3d mkldnn_adaptive_avg_pool2d"
    " adaptive_max_pool1d _adaptive_avg_pool1d"
)
def spatial(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Image operations: channels are independent; needs all elements along the other dims."""
    name, x = name_of(func), args[0]
    rank = 1 if "1d" in name else 3 if "3d" in name else 2
    whole_factors = whole_along(x, range(x.dim() - rank, x.dim()), name, record)
    return [tuple(f for f in whole_factors if f.ndim == out.dim()) for out in outs]


@rule(
    "linalg_solve_triangular triangular_solve linalg_inv_ex cholesky linalg_cholesky_ex"
    " linalg_solve_ex _linalg_solve_ex _linalg_svd _linalg_det linalg_qr linalg_matrix_exp inverse"
)
def matrices(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Linear algebra: needs whole matrices; the batch dims are independent."""
    name = name_of(func)
    operands: list[Operand] = []
    for x in args:
        if isinstance(x, Tensor):
            whole_factors = whole_along(x, (-1, -2), name, record)
            operands += [(f, parameter_of(x) is not None) for f in whole_factors]
    combined = combine([each for each in operands if each[0].ndim == outs[0].dim()], name, record)
    return [tuple(f for f in combined if f.ndim == out.dim()) for out in outs]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"
    " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    " _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math"
    " scaled_dot_product_attention"
)
def attention(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Attention on (*, heads, tokens, features): heads are independent, other dims whole."""
    operands: list[Operand] = []
    shared: list[Labels] = []
    for x in args[:3]:
        for factor in x.factors:
            if set(varying(factor)) & set(range(factor.ndim - 2)):
                whole = reduce_lines(factor, (-1, -2), record)
                times = args[0].shape[-3] // x.shape[-3] if whole.shape[-3] > 1 else 1
                operands.append((np.repeat(whole, times, -3), False))
            else:
                record.join_all(factor)
                shared.append(
                    record.atoms.roots(factor[factor > 0][:1]).reshape((1,) * factor.ndim)
                )
    mask = kwargs.get("attn_mask", kwargs.get("attn_bias"))
    for factor in factors_of(mask):
        for each in whole_along(
            Labelled(mask.inside, (factor,)), (-1, -2), "attention mask", record
        ):
            operands.append((aligned(each, outs[0].dim()), parameter_of(mask) is not None))
    combined = combine([*operands, *((each, False) for each in shared)], name_of(func), record)
    return [tuple(f for f in combined if f.ndim == out.dim()) for out in outs]
