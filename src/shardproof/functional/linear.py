"""Column and row parallel linear: forward, and a backward in which every cut sum takes the tree.

Sources: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) for the two cuts; for
the gathered input, Korthikanti et al. 2022 (arXiv 2205.05198, section 4.2).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof import observing, operands
from shardproof.autograd import once_differentiable
from shardproof.functional.rows import (
    as_rows,
    cast,
    check_alike,
    is_autocast,
    shaped,
    without_autocast,
)
from shardproof.functional.site import LinearSite
from shardproof.numerics import matmul, mode
from shardproof.observing import REPLICATE, Operand, shard

_GRADIENT = "gradient of the output"


class _ColumnLinear(torch.autograd.Function):
    """Local product forward; all_reduce (or reduce_scatter) of the input gradient backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite
    ) -> Tensor:
        rows = _whole_rows(x, site)
        _save(ctx, x if site.input_cut is None else rows, weight, site)
        return shaped(_column_of(rows, weight, bias, site), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        site: LinearSite = ctx.site
        grad_rows = as_rows(grad_y)
        if site.gather_output:
            site.axis.note(grad_y, who=site.who, what=_GRADIENT)
            grad_rows = grad_rows[:, site.owned]
        return without_autocast(grad_y, _column_gradients, ctx, grad_y, grad_rows)


def _column(x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite) -> Tensor:
    """The output as rows."""
    return _column_of(_whole_rows(x, site), weight, bias, site)


def _whole_rows(x: Tensor, site: LinearSite) -> Tensor:
    """The input of a column linear, as rows: gathered if it comes cut."""
    rows = as_rows(x)
    return rows if site.input_cut is None else site.gather(rows, site.input_cut, "forward")


def _column_of(rows: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite) -> Tensor:
    y = site.product(rows, weight, bias)
    return site.gather(y, site.cut, "forward") if site.gather_output else y


def _column_gradients(ctx: Any, grad_y: Tensor, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    """The input gradient is Partial: its sum runs while the other two are computed."""
    site: LinearSite = ctx.site
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_x, started = None, None
    if needs_x and site.input_cut is not None:
        grad_x = site.reduce_scatter(grad_rows, weight, site.input_cut)
    elif needs_x:
        started = site.start_sum(grad_rows, weight, "backward")
    grad_weight = site.weight_gradient(grad_rows, as_rows(x)) if needs_weight else None
    grad_bias = site.bias_gradient(grad_rows) if needs_bias else None
    if started is not None:
        grad_x = started.wait()
    return shaped(grad_x, grad_y), grad_weight, grad_bias, None


class _RowLinear(torch.autograd.Function):
    """all_reduce of the leaf products forward, bias added once and after; no Comm backward.

    (With `site.split_input`, an all_gather of the input gradient backward.)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite
    ) -> Tensor:
        _save(ctx, x, weight, site)
        return shaped(_row(x, weight, bias, site), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        ctx.site.axis.note(grad_y, who=ctx.site.who, what=_GRADIENT)
        return without_autocast(grad_y, _row_gradients, ctx, grad_y, as_rows(grad_y))


def _row(x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite) -> Tensor:
    """The output as rows."""
    rows = _owned_rows(x, site)
    if site.axis.size == 1 and site.is_invariant:
        y = matmul.product_sum(rows, weight, site.slices, bias, is_transposed=True)
        if observing.is_on():
            site.tell_whole(rows, weight, y, "forward", is_transposed=True, bias=bias)
        return y
    y = site.start_sum(rows, weight, "forward", is_transposed=True).wait()
    return y if bias is None else site.add_bias(y, bias)


def _owned_rows(x: Tensor, site: LinearSite) -> Tensor:
    """This rank's part of the input of a row linear, as rows; a view."""
    return as_rows(x)[:, site.owned] if site.split_input else as_rows(x)


def _row_gradients(ctx: Any, grad_y: Tensor, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    site: LinearSite = ctx.site
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_x = _product_columns(site, grad_rows, weight, "grad_x") if needs_x else None
    if grad_x is not None and site.split_input:
        grad_x = site.gather(grad_x, site.cut, "backward")
    grad_weight = None
    if needs_weight:
        rows = _owned_rows(x, site)
        grad_weight = _product_columns(site, grad_rows.t(), rows, "grad_weight")
    return (
        shaped(grad_x, grad_y),
        grad_weight,
        site.bias_gradient(grad_rows, is_cut=False) if needs_bias else None,
        None,
    )


def _save(ctx: Any, x: Tensor, weight: Tensor, site: LinearSite) -> None:
    """Keep for backward what it will need: under a frozen weight, no input.

    The input itself, not a view of it: torch then sees who writes into it in between.
    """
    ctx.site = site
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _product_columns(site: LinearSite, a: Tensor, b: Tensor, name: str) -> Tensor:
    """`grad_x` or `grad_weight`: the whole gradient times a matrix that is cut by columns."""
    y = matmul.product_columns(a, b, site.slices) if site.is_invariant else a @ b
    if observing.is_on():
        is_grad_x = name == "grad_x"
        cut = shard(1, site.owned, site.cut.size)
        named = [
            Operand("grad_y", a if is_grad_x else a.t(), REPLICATE),
            Operand("weight" if is_grad_x else "x", b, cut),
        ]
        what = f"{name} = {'grad_y @ weight' if is_grad_x else 'grad_y.T @ x'}"
        site.tell("product", "backward", what, named, Operand(name, y, cut))
    return y


def _apply(
    function: type[torch.autograd.Function],
    compute: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    site: LinearSite,
) -> Tensor:
    """Through autograd where it is wanted, and past it where it is not."""
    if site.is_invariant:
        mode.require_invariant()
    if is_autocast(x):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind)
        x, weight = cast(x, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
        with torch.autocast(kind, enabled=False):
            return _apply(function, compute, x, weight, bias, site)
    check_alike(x, weight, bias, site.who)
    if site.is_plain:
        y = F.linear(x, weight, bias)
        if observing.is_on():
            given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
            named = [Operand(name, each, REPLICATE) for name, each in given.items()]
            what = "y = x @ weight.T" + ("" if bias is None else " + bias")
            site.tell("product", "forward", what, named, Operand("y", y, REPLICATE))
        return y
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        try:
            return function.apply(x, weight, bias, site)
        except operands.ERRORS as error:
            operands.explain(error, site.who, x=x, weight=weight, bias=bias)
    try:
        return shaped(compute(x, weight, bias, site), x)
    except operands.ERRORS as error:
        operands.explain(error, site.who, x=x, weight=weight, bias=bias)


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite) -> Tensor:
    """`x @ weight.T + bias` with `weight` cut along out_features.

    Args:
        x: (*, in_features), Replicate; or (*, owned in_features), Shard(-1) with `site.input_cut`.
        weight: (owned out_features, in_features), Shard(0).
        bias: (owned out_features,), Shard(0), or None.
        site: axis, cut of out_features, scheme, name.
    Returns:
        (*, owned out_features), Shard(-1), its gradient is expected to be Shard(-1); with
        `site.gather_output` (*, out_features), and both are Replicate.
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: x, weight and bias are of several dtypes or on several devices.
    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
        site.input_cut: forward one all_gather of x (*, in_features); backward one reduce_scatter
        of grad_x (*, in_features).
        site.gather_output: forward also one all_gather of y (*, out_features).
    """
    if site.input_cut is None:
        site.axis.note(x, who=site.who)
    y = _apply(_ColumnLinear, _column, x, weight, bias, site)
    if site.gather_output:
        site.axis.note_result(y, who=site.who)
    return y


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite) -> Tensor:
    """`x @ weight.T + bias` with `weight` cut along in_features.

    Args:
        x: (*, owned in_features), Shard(-1); or (*, in_features), Replicate, with
            `site.split_input`.
        weight: (out_features, owned in_features), Shard(1).
        bias: (out_features,), Replicate, or None. Added once, after the sum.
        site: axis, cut of in_features, scheme, name.
    Returns:
        (*, out_features), Replicate; its gradient is expected to be Replicate.
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: x, weight and bias are of several dtypes or on several devices.
    Comm:
        forward one all_reduce of y (*, out_features); backward none.
        site.split_input: backward also one all_gather of grad_x (*, in_features).
    """
    if site.split_input:
        site.axis.note(x, who=site.who)
    y = _apply(_RowLinear, _row, x, weight, bias, site)
    site.axis.note_result(y, who=site.who)
    return y
