"""Linears whose weight is cut by units: fused, shared and transposed weights too.

A dim that is one plain run for each rank goes through `ops/linear.py`, unless its input
gradient is shared with other columns or its weight is stored transposed.

Sources: as there.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof import operands
from shardproof.autograd import once_differentiable
from shardproof.comm import StartedSum
from shardproof.errors import ShapeError
from shardproof.ops import unit_products as products
from shardproof.ops.input_gradients import Entering, PendingTerms, will_sum
from shardproof.ops.linear import Gathers, column_linear, row_linear
from shardproof.ops.rows import (
    as_rows,
    cast,
    check_alike,
    is_autocast,
    prepared,
    shaped,
    wants_gradient,
    without_autocast,
)
from shardproof.ops.tokens import TokenCut
from shardproof.ops.unit_products import ProductTerm
from shardproof.ops.unit_split import UnitSplit


@dataclass(frozen=True)
class _LinearCall:
    """One call of a linear: the arguments that are not tensors.

    Attributes:
        place: of the features that are cut.
        is_transposed: the weight is (in_features, out_features).
        dtype: in which autocast computes; None: that of the input.
        pending: where the term of the input gradient is left; None: it is summed alone.
        number: of this call among those of `pending`.
        tokens: how the tokens are cut of the input (column) or the output (row), if they are.
    """

    place: UnitSplit
    is_transposed: bool
    dtype: torch.dtype | None = None
    pending: PendingTerms | None = None
    number: int = 0
    tokens: TokenCut | None = None

    @property
    def who(self) -> str:
        """The layer's name."""
        return self.place.who

    def rows(self, x: Tensor) -> Tensor:
        """The input as rows, as it is multiplied."""
        return as_rows(x if self.dtype is None else cast(x, self.dtype))

    def gathered_rows(self, x: Tensor, direction: str) -> Tensor:
        """The input as rows of all tokens."""
        return self.rows(x if self.tokens is None else self.tokens.gather_input(x, direction))

    def like(self, x: Tensor) -> Tensor:
        """A tensor with the leading dims of an input of which all tokens are there."""
        return x if self.tokens is None else self.tokens.shown_whole(x)

    def matrix(self, weight: Tensor) -> Tensor:
        """(out_features, in_features), a view."""
        return weight.t() if self.is_transposed else weight


class _Column(torch.autograd.Function):
    """Local product forward; the input gradient summed, or left to be summed, backward."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: _LinearCall,
    ) -> Tensor:
        ctx.call, ctx.token, ctx.dtype = call, token, x.dtype
        _, needs_x, needs_weight, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return shaped(_column(x, weight, bias, call), call.like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_y):
            return _column_gradients(ctx, grad_y)


def _column(x: Tensor, weight: Tensor, bias: Tensor | None, call: _LinearCall) -> Tensor:
    """The output as rows."""
    rows = call.gathered_rows(x, "forward")
    return products.linear(rows, call.matrix(weight), bias, call.place)


def _column_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """The input gradient is Partial: alone, its sum runs while the other two are computed."""
    call: _LinearCall = ctx.call
    x, weight = ctx.saved_tensors
    _, needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_rows = as_rows(grad_y)
    started = grad_x = grad_weight = None
    if needs_x:
        started = _sum_or_leave(ctx, grad_y, grad_rows, weight)
    if needs_weight:
        rows = call.gathered_rows(x, "backward")
        grad_weight = _column_weight_gradient(grad_rows, rows, call)
    grad_bias = _sum_of_rows(grad_rows, call) if needs_bias else None
    if started is not None:
        grad_x = started.wait().to(ctx.dtype)
        grad_x = grad_x if call.tokens is not None else shaped(grad_x, grad_y)
    return None, grad_x, grad_weight, grad_bias, None


def _sum_or_leave(ctx: Any, grad_y: Tensor, grad_rows: Tensor, weight: Tensor) -> StartedSum | None:
    """The sum of the input gradient, started; None if it is left for the node that sums."""
    call: _LinearCall = ctx.call
    term = ProductTerm(grad_rows, call.matrix(weight), call.place)
    if call.pending is None and call.tokens is not None:
        total = products.sum_to_tokens([term], call.tokens, grad_rows, "backward", call.who)
        return StartedSum(total)
    if call.pending is None:
        return products.start_sum([term], grad_rows, "backward", call.who)
    if will_sum(ctx):
        is_armed = grad_y.requires_grad or weight.requires_grad
        call.pending.leave(call.number, term, is_armed=is_armed)
    return None


def _column_weight_gradient(grad_rows: Tensor, rows: Tensor, call: _LinearCall) -> Tensor:
    if call.is_transposed:
        return products.product_columns(rows.t(), grad_rows, call.place, over_batch=True)
    return products.product_rows(grad_rows.t(), rows, call.place, over_batch=True)


class _Row(torch.autograd.Function):
    """all_reduce of the leaf products forward, bias added once and after; no Comm backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _LinearCall
    ) -> Tensor:
        ctx.call, ctx.dtype = call, x.dtype
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _row(x, weight, bias, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        place: UnitSplit = ctx.call.place
        if ctx.call.tokens is not None:
            grad_y = ctx.call.tokens.gather(grad_y, "backward")
        place.axis.note(grad_y, who=place.who, what="gradient of the output")
        with without_autocast(grad_y):
            return _row_gradients(ctx, grad_y)


def _row(x: Tensor, weight: Tensor, bias: Tensor | None, call: _LinearCall) -> Tensor:
    """The output: (*, out_features), or (B, own tokens, out_features) with `call.tokens`."""
    rows = call.rows(x)
    term = ProductTerm(rows, call.matrix(weight).t(), call.place)
    if call.tokens is None:
        y = products.start_sum([term], rows, "forward", call.who).wait()
    else:
        y = products.sum_to_tokens([term], call.tokens, rows, "forward", call.who)
    if bias is not None:
        y.add_(bias)
        products.tell_bias(call.place, y, bias)
    return y if call.tokens is not None else shaped(y, x)


def _row_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    call: _LinearCall = ctx.call
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_rows, grad_x, grad_weight = as_rows(grad_y), None, None
    if needs_x:
        grad_x = products.product_columns(grad_rows, call.matrix(weight), call.place)
        grad_x = shaped(grad_x.to(ctx.dtype), grad_y)
    if needs_weight and call.is_transposed:
        grad_weight = products.product_rows(
            call.rows(x).t(), grad_rows, call.place, over_batch=True
        )
    elif needs_weight:
        grad_weight = products.product_columns(
            grad_rows.t(), call.rows(x), call.place, over_batch=True
        )
    return grad_x, grad_weight, _sum_of_rows(grad_rows, call) if needs_bias else None, None


def _sum_of_rows(grad_rows: Tensor, call: _LinearCall) -> Tensor:
    return call.place.arithmetic.sum_batch_rows(grad_rows)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, call: _LinearCall, dims: tuple[int, int]
) -> None:
    """Raise unless the operands fit each other and the place; `dims`: out- and in-features."""
    weight_shape = dims[::-1] if call.is_transposed else dims
    is_fit = x.dim() > 0 and x.shape[-1] == dims[1] and weight.shape == weight_shape
    if not is_fit or (bias is not None and bias.shape != dims[:1]):
        shapes = [tuple(x.shape), tuple(weight.shape), None if bias is None else tuple(bias.shape)]
        raise ShapeError(
            f"{call.who} on {call.place.axis}: x, weight and bias have shapes {shapes}, and x (*, "
            f"{dims[1]}), weight {tuple(weight_shape)} and bias {dims[:1]} fit what this rank "
            "holds. Give the part that the place describes."
        )


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, call: _LinearCall
) -> tuple[Tensor, Tensor | None, _LinearCall]:
    """Weight and bias as autocast wants them, and the call; raises where bits cannot be kept."""
    call.place.arithmetic.require()
    if not is_autocast(x):
        check_alike(x, weight, bias, call.who)
        return weight, bias, call
    operands.check(call.who, x=x, weight=weight, bias=bias)
    _, _, weight, bias = prepared(x, weight, bias)
    return weight, bias, replace(call, dtype=torch.get_autocast_dtype(x.device.type))


def column(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: UnitSplit,
    *,
    entering: Entering | None = None,
    is_transposed: bool = False,
    tokens: TokenCut | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with out_features cut by units.

    Args:
        x: (*, in_features), Replicate; or (B, own tokens, in_features), Shard(1), with `tokens`.
        weight: (held, in_features), Shard(0); (in_features, held), Shard(1), if `is_transposed`.
        bias: (held,), Shard(0), or None.
        place: of out_features.
        entering: the handle of `x`: columns that are given the same one sum their input gradients
            together.
        is_transposed: how the weight is stored.
        tokens: how the tokens of `x` are cut, if they are.
    Returns:
        (*, held), Shard(-1); its gradient is expected to be complete at every rank that holds a
        feature.
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: the operands do not fit, or are of several dtypes or on several devices.
    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
        all columns of one `entering` whose trees are alike: forward none; backward one all_reduce
        of grad_x (*, in_features).
        tokens: forward one all_gather of x (*, in_features); backward one all_gather of x (*,
        in_features); backward one reduce_scatter of grad_x (*, in_features).
    """
    if place.plain_split is not None and entering is None and not is_transposed:
        return column_linear(x, weight, bias, place.plain_split, Gathers(tokens=tokens))
    call = _LinearCall(place, is_transposed, tokens=tokens)
    in_features = weight.shape[0 if is_transposed else -1] if weight.dim() == 2 else -1
    _check(x, weight, bias, call, (place.length, in_features))
    if tokens is None:
        place.axis.note(x, who=place.who)
    if place.is_plain_torch:
        return F.linear(x, call.matrix(weight), bias)
    weight, bias, call = _prepared(x, weight, bias, call)
    token = None
    if entering is not None and x.requires_grad and torch.is_grad_enabled():
        token, pending = entering.token(x, tokens)
        call = replace(call, pending=pending, number=pending.next_number())
    try:
        with without_autocast(x):
            y = _apply_column(token, x, weight, bias, call)
    except operands.ERRORS as error:
        operands.explain(error, call.who, x=x, weight=weight, bias=bias)
    return y


def _apply_column(
    token: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, call: _LinearCall
) -> Tensor:
    if wants_gradient(x, weight, bias):
        y: Tensor = _Column.apply(token, x, weight, bias, call)
        return y
    return shaped(_column(x, weight, bias, call), call.like(x))


def row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: UnitSplit,
    *,
    is_transposed: bool = False,
    tokens: TokenCut | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with in_features cut by units, every index counted by its owner.

    Args:
        x: (*, held), Shard(-1).
        weight: (out_features, held), Shard(1); (held, out_features), Shard(0), if
            `is_transposed`.
        bias: (out_features,), Replicate, or None. Added once, after the sum.
        place: of in_features.
        is_transposed: how the weight is stored.
        tokens: each rank gets the output of its own tokens; `x` is (B, T, held) then.
    Returns:
        (*, out_features), Replicate; its gradient is expected to be Replicate. With `tokens`
        (B, own tokens, out_features), both Shard(1).
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: the operands do not fit, or are of several dtypes or on several devices.
    Comm:
        forward one all_reduce of y (*, out_features); backward none.
        tokens: forward one reduce_scatter of y (*, out_features); backward one all_gather of
        grad_y (*, out_features).
    """
    if place.plain_split is not None and not is_transposed:
        return row_linear(x, weight, bias, place.plain_split, tokens=tokens)
    call = _LinearCall(place, is_transposed, tokens=tokens)
    out_features = weight.shape[-1 if is_transposed else 0] if weight.dim() == 2 else -1
    _check(x, weight, bias, call, (out_features, place.length))
    if place.is_plain_torch:
        return F.linear(x, call.matrix(weight), bias)
    weight, bias, call = _prepared(x, weight, bias, call)
    try:
        with without_autocast(x):
            y = _apply_row(x, weight, bias, call)
    except operands.ERRORS as error:
        operands.explain(error, call.who, x=x, weight=weight, bias=bias)
    if tokens is None:
        place.axis.note_result(y, who=place.who)
    return y


def _apply_row(x: Tensor, weight: Tensor, bias: Tensor | None, call: _LinearCall) -> Tensor:
    if wants_gradient(x, weight, bias):
        y: Tensor = _Row.apply(x, weight, bias, call)
        return y
    return _row(x, weight, bias, call)
