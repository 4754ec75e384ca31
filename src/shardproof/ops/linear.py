"""Column and row parallel linear: forward, and a backward in which every cut sum takes the tree.

Sources: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) for the two cuts; for
the gathered input, Korthikanti et al. 2022 (arXiv 2205.05198, section 4.2).
"""

from typing import Any, NamedTuple

from torch import Tensor

from shardproof import comm, observing, operands
from shardproof.autograd import OwnFunction, once_differentiable
from shardproof.comm.split import Split
from shardproof.numerics import matmul
from shardproof.ops import linear_products as products
from shardproof.ops import linear_steps as steps
from shardproof.ops.rows import (
    as_rows,
    check_alike,
    prepared,
    shaped,
    wants_gradient,
    without_autocast,
)
from shardproof.ops.tokens import TokenCut

_GRADIENT = "gradient of the output"


class Gathers(NamedTuple):
    """What a column linear gathers.

    Attributes:
        input: how the input is cut along its last dim, if it is gathered first.
        output: whether the output is gathered to Replicate.
        tokens: how the tokens of the input are cut, if they are gathered first.
    """

    input: Split | None = None
    output: bool = False
    tokens: TokenCut | None = None


NOTHING = Gathers()


class _ColumnLinear(OwnFunction):
    """Local product forward; all_reduce (or reduce_scatter) of the input gradient backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, split: Split, gathers: Gathers
    ) -> Tensor:
        rows = _whole_rows(x, gathers)
        ctx.split, ctx.gathers = split, gathers
        _save(ctx, x if gathers.input is None else rows, weight)
        y = _column(rows, weight, bias, split, gathers)
        return shaped(y, x if gathers.tokens is None else gathers.tokens.shown_whole(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        split: Split = ctx.split
        grad_rows = as_rows(grad_y)
        if ctx.gathers.output:
            split.axis.note(grad_y, who=split.name, what=_GRADIENT)
            grad_rows = grad_rows[:, split.owned]
        with without_autocast(grad_y):
            return _column_gradients(ctx, grad_y, grad_rows)


def _whole_rows(x: Tensor, gathers: Gathers) -> Tensor:
    """The input of a column linear, as rows: gathered if it comes cut."""
    if gathers.tokens is not None:
        return as_rows(gathers.tokens.gather_input(x, "forward"))
    rows = as_rows(x)
    return rows if gathers.input is None else gathers.input.gather(rows, "forward")


def _column(
    rows: Tensor, weight: Tensor, bias: Tensor | None, split: Split, gathers: Gathers
) -> Tensor:
    """The output as rows."""
    y = products.product(rows, weight, bias, split)
    return split.gather(y, "forward") if gathers.output else y


def _column_gradients(ctx: Any, grad_y: Tensor, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    """The input gradient is Partial: its sum may run while the other two are computed."""
    split: Split = ctx.split
    x, weight = ctx.saved_tensors
    tokens: TokenCut | None = ctx.gathers.tokens
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = started = None
    if needs_x:
        parts = split.arithmetic.product_parts(grad_rows, weight, split.leaves)
        if observing.is_on():
            steps.tell_parts(split, grad_rows, weight, parts, "backward")
        shape = (grad_rows.shape[0], weight.shape[1])
        if ctx.gathers.input is not None:
            into = comm.ShardOf(shape, 1, ctx.gathers.input.cut)
            grad_x = split.sum_scatter(parts, into=into, like=grad_rows, direction="backward")
        elif tokens is not None:
            grad_x = tokens.scatter(parts, split, shape=shape, like=grad_rows, direction="backward")
        else:
            started = split.start_sum(parts, shape=shape, like=grad_rows, direction="backward")
    grad_weight = grad_bias = None
    if needs_weight:
        if tokens is not None:
            x = tokens.gather_input(x, "backward")
        grad_weight = products.weight_gradient(grad_rows, as_rows(x), split)
    if needs_bias:
        grad_bias = products.bias_gradient(grad_rows, split, is_cut=True)
    if started is not None:
        grad_x = started.wait()
    grad_x = grad_x if tokens is not None else shaped(grad_x, grad_y)
    return grad_x, grad_weight, grad_bias, None, None


class _RowLinear(OwnFunction):
    """all_reduce of the leaf products forward, bias added once and after; no Comm backward.

    (With `splits_input`, an all_gather of the input gradient backward.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        split: Split,
        splits_input: bool,
        tokens: TokenCut | None,
    ) -> Tensor:
        ctx.split, ctx.splits_input, ctx.tokens = split, splits_input, tokens
        _save(ctx, x, weight)
        y = _row(x, weight, bias, split, splits_input, tokens)
        return y if tokens is not None else shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.tokens is not None:
            grad_y = ctx.tokens.gather(grad_y, "backward")
        ctx.split.axis.note(grad_y, who=ctx.split.name, what=_GRADIENT)
        with without_autocast(grad_y):
            return (*_row_gradients(ctx, grad_y, as_rows(grad_y)), None)


def _row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    split: Split,
    splits_input: bool,
    tokens: TokenCut | None = None,
) -> Tensor:
    """The output as rows; with `tokens`, (B, own tokens, out_features)."""
    rows = _owned_rows(x, split, splits_input)
    if split.axis.size == 1:
        y = matmul.product_sum(rows, weight, split.leaves.slices, bias, is_transposed=True)
        if observing.is_on():
            steps.tell_alone(split, rows, weight, y, "forward", bias)
        return y
    parts = split.arithmetic.product_parts(rows, weight, split.leaves, is_transposed=True)
    if observing.is_on():
        steps.tell_parts(split, rows, weight, parts, "forward")
    shape = (rows.shape[0], weight.shape[0])
    if tokens is not None:
        y = tokens.scatter(parts, split, shape=shape, like=rows, direction="forward")
        return y if bias is None else products.add_bias(y, bias, split)
    y = split.start_sum(parts, shape=shape, like=rows, direction="forward").wait()
    return y if bias is None else products.add_bias(y, bias, split)


def _owned_rows(x: Tensor, split: Split, splits_input: bool) -> Tensor:
    """This rank's part of the input of a row linear, as rows; a view."""
    return as_rows(x)[:, split.owned] if splits_input else as_rows(x)


def _row_gradients(ctx: Any, grad_y: Tensor, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    split: Split = ctx.split
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = None
    if needs_x:
        grad_x = products.product_columns(split, grad_rows, weight, "grad_x")
        if ctx.splits_input:
            grad_x = split.gather(grad_x, "backward")
    if needs_weight:
        rows = _owned_rows(x, split, ctx.splits_input)
        grad_weight = products.product_columns(
            split, grad_rows.t(), rows, "grad_weight", over_batch=True
        )
    grad_bias = products.bias_gradient(grad_rows, split, is_cut=False) if needs_bias else None
    return shaped(grad_x, grad_y), grad_weight, grad_bias, None, None


def _save(ctx: Any, x: Tensor, weight: Tensor) -> None:
    """Keep for backward what it will need: under a frozen weight, no input.

    The input itself, not a view of it: torch then sees who writes into it in between.
    """
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, split: Split, gathers: Gathers = NOTHING
) -> Tensor:
    """`x @ weight.T + bias` with `weight` cut along out_features.

    Args:
        x: (*, in_features), Replicate; or (*, owned in_features), Shard(-1) with `gathers.input`;
            or (B, own tokens, in_features), Shard(1) with `gathers.tokens`.
        weight: (owned out_features, in_features), Shard(0).
        bias: (owned out_features,), Shard(0), or None.
        split: of out_features.
        gathers: whether input or output are gathered.
    Returns:
        (*, owned out_features), Shard(-1), its gradient is expected to be Shard(-1); with
        `gathers.output` (*, out_features), and both are Replicate.
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: x, weight and bias are of several dtypes or on several devices.
    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
        gathers.input: forward one all_gather of x (*, in_features); backward one reduce_scatter
        of grad_x (*, in_features).
        gathers.output: forward also one all_gather of y (*, out_features).
        gathers.tokens: forward one all_gather of x (*, in_features); backward one all_gather of x
        (*, in_features); backward one reduce_scatter of grad_x (*, in_features).
    """
    if gathers.input is None and gathers.tokens is None:
        split.axis.note(x, who=split.name)
    split.arithmetic.require()
    context, x, weight, bias = prepared(x, weight, bias)
    check_alike(x, weight, bias, split.name)
    try:
        with context:
            if split.is_plain:
                y = products.plain_linear(x, weight, bias, split)
            elif wants_gradient(x, weight, bias):
                y = _ColumnLinear.apply(x, weight, bias, split, gathers)
            else:
                y = _column(_whole_rows(x, gathers), weight, bias, split, gathers)
                y = shaped(y, x if gathers.tokens is None else gathers.tokens.shown_whole(x))
    except operands.ERRORS as error:
        operands.explain(error, split.name, x=x, weight=weight, bias=bias)
    if gathers.output:
        split.axis.note_result(y, who=split.name)
    return y


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    split: Split,
    *,
    splits_input: bool = False,
    tokens: TokenCut | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with `weight` cut along in_features.

    Args:
        x: (*, owned in_features), Shard(-1); or (*, in_features), Replicate, if `splits_input`.
        weight: (out_features, owned in_features), Shard(1).
        bias: (out_features,), Replicate, or None. Added once, after the sum.
        split: of in_features.
        splits_input: the input comes whole, and each rank takes what it owns of it.
        tokens: each rank gets the output of its own tokens; `x` is (B, T, *) then.
    Returns:
        (*, out_features), Replicate; its gradient is expected to be Replicate. With `tokens`
        (B, own tokens, out_features), both Shard(1).
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: x, weight and bias are of several dtypes or on several devices.
    Comm:
        forward one all_reduce of y (*, out_features); backward none.
        splits_input: backward also one all_gather of grad_x (*, in_features).
        tokens: forward one reduce_scatter of y (*, out_features); backward one all_gather of
        grad_y (*, out_features).
    """
    if splits_input:
        split.axis.note(x, who=split.name)
    split.arithmetic.require()
    context, x, weight, bias = prepared(x, weight, bias)
    check_alike(x, weight, bias, split.name)
    try:
        with context:
            if split.is_plain:
                y = products.plain_linear(x, weight, bias, split)
            elif wants_gradient(x, weight, bias):
                y = _RowLinear.apply(x, weight, bias, split, splits_input, tokens)
            elif tokens is not None:
                y = _row(x, weight, bias, split, splits_input, tokens)
            else:
                y = shaped(_row(x, weight, bias, split, splits_input), x)
    except operands.ERRORS as error:
        operands.explain(error, split.name, x=x, weight=weight, bias=bias)
    if tokens is None:
        split.axis.note_result(y, who=split.name)
    return y
