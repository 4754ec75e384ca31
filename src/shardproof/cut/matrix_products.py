"""Rules for matrix products: linear layers cut by columns or rows, and batched products."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.autograd import once_differentiable
from shardproof.cut.alignment import (
    broadcast,
    finest_of,
    fitted,
    is_one_shared_unit,
    refined,
    whole_or_zeros,
)
from shardproof.cut.fallback import gathered, invariant, whole
from shardproof.cut.own_tokens import DIM, cut_of, is_to_be_cut, token_cut, tokens_of
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor, named, rule, run
from shardproof.numerics import dim_sums
from shardproof.ops import unit_ops


def entering(x: Tensor) -> Any:
    """The object by which column products with one whole input share one sum of its gradient."""
    shared = getattr(x, "_shardproof_entering", None)
    if shared is None:
        shared = unit_ops.Entering()
        x._shardproof_entering = shared  # type: ignore[attr-defined]
    return shared


def product(x: Any, weight: Any, bias: Any, *, is_transposed: bool, func: Any = F.linear) -> Any:
    """`x @ weight.T + bias`, or without `.T`: column, row, or along some other dim.

    Args:
        x: (*, in_features), cut or whole.
        weight: (out_features, in_features), or its transpose; cut or whole.
        bias: (out_features,) or None; cut or whole.
        is_transposed: whether `weight` is (in_features, out_features).
        func: the function that was called, for messages.
    """
    out_dim = 1 if is_transposed else 0
    last = x.dim() - 1
    if isinstance(weight, CutTensor) and weight.spec.dim == out_dim:
        cut = tokens_of(x)
        if isinstance(x, CutTensor) and cut is None:
            x = whole(x, f"{func.__name__} of two cuts")
        spec = weight.spec.region.spec(
            (*x.shape[:-1], weight.shape[out_dim]), last, weight.spec.cut
        )
        place = spec.region.place(spec.cut, weight.who)
        own = bias
        if bias is not None:
            own = fitted(bias, spec.region.spec((weight.shape[out_dim],), 0, spec.cut), weight.who)
        tokens = None if cut is None else token_cut(spec.region, cut, x.who)
        rows = x if cut is None else x.local
        y = unit_ops.column(
            rows,
            weight.local,
            own,
            place,
            entering=entering(rows) if rows.requires_grad and torch.is_grad_enabled() else None,
            is_transposed=is_transposed,
            tokens=tokens,
        )
        return cut_tensor(y, spec, weight.who)
    if isinstance(bias, CutTensor):
        region = bias.spec.region
        if not isinstance(x, CutTensor) and not isinstance(weight, CutTensor):
            y = invariant(region, F.linear, "")(x, weight.t() if is_transposed else weight)
        else:
            y = product(x, weight, None, is_transposed=is_transposed, func=func)
        return run(torch.add, (y, bias), {})
    if isinstance(weight, CutTensor):
        cut, region = weight.spec.cut, weight.spec.region
        place = region.place(cut, weight.who)
        if isinstance(x, CutTensor) and x.spec.dim == last:
            part = refined(x, cut).local
        else:
            if isinstance(x, CutTensor):
                x = whole(x, f"{func.__name__} of two cuts")
            part = unit_ops.take(x, last, place)
        if is_to_be_cut(region, x):
            return _row_of_own_tokens(part, weight, bias, x.shape, is_transposed=is_transposed)
        return unit_ops.row(part, weight.local, bias, place, is_transposed=is_transposed)
    return _of_whole_weight(x, weight, bias, is_transposed, func)


def _row_of_own_tokens(
    part: Tensor, weight: CutTensor, bias: Any, shape: Sequence[int], *, is_transposed: bool
) -> CutTensor:
    """A product over a cut dim, of which each rank gets its own tokens; `shape` is the input's."""
    region = weight.spec.region
    out_shape = (*shape[:-1], weight.shape[1 - weight.spec.dim])
    spec = region.spec(out_shape, DIM, cut_of(region, shape[DIM]))
    y = unit_ops.row(
        part,
        weight.local,
        bias,
        region.place(weight.spec.cut, weight.who),
        is_transposed=is_transposed,
        tokens=token_cut(region, spec.cut, weight.who),
    )
    return cut_tensor(y, spec, weight.who)


def _of_whole_weight(
    x: CutTensor, weight: Tensor, bias: Any, is_transposed: bool, func: Any
) -> Any:
    """A product with a whole weight, whose gradient is summed over ranks, since rows are cut."""
    spec = x.spec
    if spec.dim == x.dim() - 1:
        rows = whole(x, f"{func.__name__} of a whole weight")
        form = invariant(spec.region, F.linear, "")
        return form(rows, weight.t() if is_transposed else weight, bias)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        y = batched(
            x if spec.dim < x.dim() - 2 else x.unsqueeze(-2),
            weight if is_transposed else weight.t(),
        )
        y = y if spec.dim < x.dim() - 2 else y.squeeze(-2)
        return y if bias is None else run(torch.add, (y, bias), {})
    form = invariant(spec.region, F.linear, x.who)
    y = form(x.local, weight.t() if is_transposed else weight, bias)
    out = weight.shape[1 if is_transposed else 0]
    return cut_tensor(y, spec.region.spec((*x.shape[:-1], out), spec.dim, spec.cut), x.who)


@rule("linear")
def linear(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.linear`."""
    return product(*named(args, kwargs, "input", "weight", "bias"), is_transposed=False)


@rule("addmm")
def addmm(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.addmm`: `bias + x @ weight`, as the Conv1D of transformers computes it."""
    bias, x, weight = named(args, kwargs, "input", "mat1", "mat2")
    if kwargs.get("alpha", 1) == 1 == kwargs.get("beta", 1) and bias.dim() == 1:
        return product(x, weight, bias, is_transposed=True, func=torch.addmm)
    y = run(torch.matmul, (x, weight), {})
    if kwargs.get("alpha", 1) != 1:
        y = y * kwargs["alpha"]
    return y if kwargs.get("beta", 1) == 0 else bias * kwargs.get("beta", 1) + y


@rule("baddbmm")
def baddbmm(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.baddbmm`: `beta * input + alpha * a @ b`, batched."""
    x, a, b = named(args, kwargs, "input", "batch1", "batch2")
    y = run(torch.matmul, (a, b), {})
    if kwargs.get("alpha", 1) != 1:
        y = y * kwargs["alpha"]
    beta = kwargs.get("beta", 1)
    return y if beta == 0 else (x if beta == 1 else x * beta) + y


@rule("inner")
def inner(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.inner`: the inner product of every pair of vectors along the last dims."""
    a, b = named(args, kwargs, "input", "other")
    if a.dim() == 0 or b.dim() == 0:
        return run(torch.mul, (a, b), {})
    return run(torch.tensordot, (a, b, ([-1], [-1])), {})


@rule("matmul", "mm", "bmm", "mv", "dot", "rmatmul")
def matmul(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.matmul` and its like, batched or not."""
    a, b = named(args, kwargs, "input", "other")
    if b is None:
        b = kwargs.get("mat2", kwargs.get("tensor", kwargs.get("vec")))
    if name == "rmatmul":
        a, b = b, a
    if a.dim() < 1 or b.dim() < 1 or min(a.dim(), b.dim()) == 1:
        return _with_vectors(a, b)
    if b.dim() == 2 and a.dim() >= 2 and name != "bmm":
        return product(a, b, None, is_transposed=True, func=torch.matmul)
    return batched(a, b)


def _with_vectors(a: Any, b: Any) -> Any:
    if a.dim() == 1 and b.dim() == 1:
        return run(Tensor.sum, (a * b,), {})
    if a.dim() == 1:
        return run(Tensor.squeeze, (run(torch.matmul, (a[None], b), {}), -2), {})
    return run(Tensor.squeeze, (run(torch.matmul, (a, b[:, None]), {}), -1), {})


def batched(a: Any, b: Any) -> Any:
    """(*, M, K) @ (*, K, N), where one or both operands are cut along one dim."""
    if (
        isinstance(a, CutTensor)
        and isinstance(b, CutTensor)
        and is_one_shared_unit(a) != is_one_shared_unit(b)
    ):
        a, b = (whole_or_zeros(each) if is_one_shared_unit(each) else each for each in (a, b))
    region = (a if isinstance(a, CutTensor) else b).spec.region
    shape = (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    sides = [(each, side) for side, each in enumerate((a, b)) if isinstance(each, CutTensor)]
    roles = {_role(each, side, len(shape)) for each, side in sides}
    if len(roles) > 1:
        return gathered(torch.matmul, "matmul of two cuts", (a, b), {})
    (dim,) = roles
    if dim is None:
        return _contracted(a, b)
    if dim == len(shape) - 1 and not isinstance(a, CutTensor):
        return _batched_column(a, b, shape)
    if dim == len(shape) - 2 and not isinstance(b, CutTensor):
        y = _batched_column(b.transpose(-2, -1), a.transpose(-2, -1), (*shape[:-2], *shape[:-3:-1]))
        return y.transpose(-2, -1)
    finest = finest_of([each for each, _ in sides])
    spec = region.spec(shape, dim, finest.spec.cut)
    parts = [_as_operand(each, spec, finest.who) for each in (a, b)]
    y = invariant(region, torch.matmul, finest.who)(*parts)
    return cut_tensor(y, spec, finest.who)


def _batched_column(a: Tensor, b: CutTensor, shape: tuple[int, ...]) -> CutTensor:
    """(*, M, K), whole, times (*, K, N) with cut N: the gradient of `a` is summed over ranks."""
    spec = b.spec.region.spec(shape, len(shape) - 1, b.spec.cut)
    place = spec.region.place(spec.cut, b.who)
    product = invariant(spec.region, torch.matmul, b.who)
    a = dim_sums.expand(a, (*shape[:-2], *a.shape[-2:]))
    local = dim_sums.expand(b.local, (*shape[:-2], *b.local.shape[-2:]))
    return cut_tensor(_BatchedColumn.apply(a, local, place, product), spec, b.who)


class _BatchedColumn(torch.autograd.Function):
    """A batched product whose N is cut."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, place: Any, product: Any) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.place, ctx.product = place, product
        y: Tensor = product(a, b)
        return y.data  # a new tensor: torch refuses in-place writes to a view here

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad[:2]
        grad_a = unit_ops.contract(grad, b.mT, ctx.place) if needs_a else None
        return grad_a, ctx.product(a.mT, grad) if needs_b else None, None, None


def _role(x: CutTensor, side: int, dims: int) -> int | None:
    """The dim of the result to which the cut dim of an operand goes; None if it is contracted."""
    dim = x.spec.dim - x.dim()
    return None if dim == (-1 if side == 0 else -2) else dims + dim


def _as_operand(x: Any, spec: Spec, who: str) -> Tensor:
    """This rank's part of one operand of a batched product."""
    own = spec.dim - len(spec.shape) + x.dim()
    if isinstance(x, CutTensor):
        return refined(x, spec.cut).local
    place = spec.region.place(spec.cut, who)
    is_batch = spec.dim < len(spec.shape) - 2
    if is_batch and own >= 0 and x.shape[own] == spec.shape[spec.dim]:
        return unit_ops.take(x, own, place)
    if x.requires_grad and torch.is_grad_enabled():
        # Every rank multiplies with it, so its gradient is summed over the ranks.
        lead = spec.local_shape[: len(spec.shape) - 2]
        return unit_ops.spread(x, (*lead, *x.shape[-2:]), spec.dim, place)
    return x


def _contracted(a: Any, b: Any) -> Tensor:
    """The product of two operands whose contracted dim is cut."""
    finest = finest_of([each for each in (a, b) if isinstance(each, CutTensor)])
    place = finest.spec.region.place(finest.spec.cut, finest.who)
    left, right = (
        refined(x, finest.spec.cut).local
        if isinstance(x, CutTensor)
        else unit_ops.take(x, x.dim() - 1 - side, place)
        for side, x in enumerate((a, b))
    )
    return unit_ops.contract(left, right, place)
