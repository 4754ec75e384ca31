"""Column and row parallel linear: forward, and a backward in which every cut sum takes the tree.

Sources: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3) for the two cuts; for
the gathered input, Korthikanti et al. 2022 (arXiv 2205.05198, section 4.2).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.leaves import Cut
from shardproof.numerics import matmul, mode
from shardproof.numerics.sums import sum_rows
from shardproof.scheme import Scheme


@dataclass(frozen=True)
class LinearSite:
    """Where a cut linear stands: everything that is no tensor.

    Attributes:
        axis: the ranks.
        cut: of the weight: out_features (column) or in_features (row).
        scheme: leaves and numerics.
        who: the layer's name, for messages and the ledger.
        input_cut: column only: how the input is cut along its last dim if it is gathered first.
        run, slices: this rank's leaves, and where each lies in the shard; from `cut`.
    """

    axis: Axis
    cut: Cut
    scheme: Scheme
    who: str = ""
    input_cut: Cut | None = None
    run: range = field(init=False)
    slices: tuple[slice, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", self.cut.run(self.axis.rank))
        object.__setattr__(self, "slices", self.cut.leaf_slices(self.axis.rank))

    def nodes(self, a: Tensor, b: Tensor) -> dict[Any, Tensor]:
        """Canonical nodes of `a @ b`, contracted along the dim that `cut` cuts."""
        return matmul.product_nodes(a, b, self.slices, run=self.run, num_leaves=self.cut.num_leaves)

    def all_reduce(self, a: Tensor, b: Tensor, direction: str) -> Tensor:
        """`a @ b` summed over the axis: (M, c) and (c, N) to (M, N), Replicate."""
        if not self.scheme.is_invariant:
            return comm.all_reduce(a @ b, self.axis, direction=direction, who=self.who)
        return comm.all_reduce_nodes(
            self.nodes(a, b),
            self.axis,
            cut=self.cut,
            shape=(a.shape[0], b.shape[1]),
            like=a,
            direction=direction,
            who=self.who,
        )

    def reduce_scatter(self, a: Tensor, b: Tensor, input_cut: Cut) -> Tensor:
        """`a @ b` summed over the axis in backward, cut along N: (M, owned), Shard(1)."""
        if not self.scheme.is_invariant:
            return comm.reduce_scatter(
                a @ b, self.axis, dim=1, cut=input_cut, direction="backward", who=self.who
            )
        return comm.reduce_scatter_nodes(
            self.nodes(a, b),
            self.axis,
            cut=self.cut,
            shape=(a.shape[0], b.shape[1]),
            dim=1,
            dim_cut=input_cut,
            like=a,
            direction="backward",
            who=self.who,
        )


Product = Callable[[LinearSite, Tensor, Tensor], Tensor]


class _ColumnLinear(torch.autograd.Function):
    """Local product forward; all_reduce (or reduce_scatter) of the input gradient backward.

    Matrices only: x is (rows, in_features).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite
    ) -> Tensor:
        if site.input_cut is not None:
            x = comm.all_gather(
                x, site.axis, dim=1, cut=site.input_cut, direction="forward", who=site.who
            )
        ctx.site = site
        _save(ctx, x, weight)
        if site.scheme.is_invariant:
            return matmul.linear(x, weight, bias, site.slices)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_y, _ColumnLinear.grad_x, _rows)

    @staticmethod
    def grad_x(site: LinearSite, grad_y: Tensor, weight: Tensor) -> Tensor:
        """Partial over the axis until it is summed."""
        if site.input_cut is None:
            return site.all_reduce(grad_y, weight, "backward")
        return site.reduce_scatter(grad_y, weight, site.input_cut)


class _RowLinear(torch.autograd.Function):
    """all_reduce of the leaf products forward, bias added once and after; no Comm backward.

    Matrices only: x is (rows, owned in_features).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite
    ) -> Tensor:
        ctx.site = site
        _save(ctx, x, weight)
        y = site.all_reduce(x, weight.t(), "forward")
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_y, _columns, _columns)


def _save(ctx: Any, x: Tensor, weight: Tensor) -> None:
    """Keep for backward what it will need: under a frozen weight, no input."""
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _backward(
    ctx: Any, grad_y: Tensor, grad_x_of: Product, grad_weight_of: Product
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, each only if it is asked for; None for the site."""
    site: LinearSite = ctx.site
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    with plain_arithmetic(grad_y.device):
        return (
            grad_x_of(site, grad_y, weight) if needs_x else None,
            grad_weight_of(site, grad_y.t(), x) if needs_weight else None,
            _bias_gradient(site, grad_y) if needs_bias else None,
            None,
        )


def _as_rows(x: Tensor) -> Tensor:
    """(*, n) to (rows, n); a rank without leaves has n = 0, of which -1 could not be guessed."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _rows(site: LinearSite, a: Tensor, b: Tensor) -> Tensor:
    return matmul.product_rows(a, b, site.slices) if site.scheme.is_invariant else a @ b


def _columns(site: LinearSite, a: Tensor, b: Tensor) -> Tensor:
    return matmul.product_columns(a, b, site.slices) if site.scheme.is_invariant else a @ b


def _bias_gradient(site: LinearSite, grad_y: Tensor) -> Tensor:
    return sum_rows(grad_y) if site.scheme.is_invariant else grad_y.sum(0)


def _is_autocast(device: torch.device) -> bool:
    # There is none for meta tensors, and torch raises where it is asked.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def plain_arithmetic(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside: what is to be cast has been cast where the function was called."""
    if _is_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does to the operands of a linear, done where autograd sees it."""
    device = next(x.device for x in tensors if x is not None)
    if not _is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if x is not None and x.dtype in narrow else x for x in tensors)


def _check_alike(x: Tensor, weight: Tensor, bias: Tensor | None, who: str) -> None:
    """Raise before anything is sent unless the operands have one dtype and one device.

    On all ranks alike: torch itself would raise on those alone that have something to multiply.
    """
    others = (weight,) if bias is None else (weight, bias)
    if all(other.dtype == x.dtype and other.device == x.device for other in others):
        return
    named = {"x": x, "weight": weight, "bias": bias}
    given = ", ".join(
        f"{name} is {value.dtype} on {value.device}"
        for name, value in named.items()
        if value is not None
    )
    raise ShapeError(
        f"{who}: {given}, and a linear takes one dtype and one device. Cast the input with "
        "x.to(layer.weight), or the layer with layer.to(x), or use torch.autocast."
    )


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite) -> Tensor:
    """`x @ weight.T + bias` with `weight` cut along out_features.

    Args:
        x: (*, in_features), Replicate; or (*, owned in_features), Shard(-1) with `site.input_cut`.
        weight: (owned out_features, in_features), Shard(0).
        bias: (owned out_features,), Shard(0), or None.
        site: axis, cut of out_features, scheme, name.
    Returns:
        (*, owned out_features), Shard(-1); its gradient is expected to be Shard(-1).
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: x, weight and bias are of several dtypes or on several devices.
    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
        site.input_cut: forward one all_gather of x (*, in_features); backward one reduce_scatter
        of grad_x (*, in_features).
    """
    if site.scheme.is_invariant:
        mode.require_invariant()
    x, weight, bias = _cast(x, weight, bias)  # type: ignore[assignment]
    _check_alike(x, weight, bias, site.who or "column_linear")
    with plain_arithmetic(x.device):
        # Reshaped out here, by autograd: into a view that a Function makes nobody may write.
        y = _ColumnLinear.apply(_as_rows(x), weight, bias, site)
    return y.view(*x.shape[:-1], weight.shape[0])


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite) -> Tensor:
    """`x @ weight.T + bias` with `weight` cut along in_features.

    Args:
        x: (*, owned in_features), Shard(-1).
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
    """
    if site.scheme.is_invariant:
        mode.require_invariant()
    x, weight, bias = _cast(x, weight, bias)  # type: ignore[assignment]
    _check_alike(x, weight, bias, site.who or "row_linear")
    with plain_arithmetic(x.device):
        # Reshaped out here, by autograd: into a view that a Function makes nobody may write.
        y = _RowLinear.apply(_as_rows(x), weight, bias, site)
    return y.view(*x.shape[:-1], weight.shape[0])
