"""The rule for triangular solves: each rank solves the matrices that it holds."""

from typing import Any

import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.cut.alignment import common, fitted, one_along
from shardproof.cut.fallback import gathered
from shardproof.cut.tensor import CutTensor, cut_tensor, rule
from shardproof.numerics.torch_products import matmul


@rule("linalg_solve_triangular", "solve_triangular")
def solve_triangular(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.linalg.solve_triangular(A, B)` of a batch that is cut along a leading dim."""
    arguments = dict(zip(("A", "B"), args, strict=False)) | kwargs
    a, b = arguments["A"], arguments["B"]
    cuts = [each for each in (a, b) if isinstance(each, CutTensor)]
    is_batch = all(each.spec.dim < each.dim() - 2 for each in cuts)
    if not is_batch or a.shape[:-2] != b.shape[:-2]:
        return gathered(func, name, args, kwargs)
    lead = tuple(a.shape[:-2])
    ones = [one_along(one_along(each, each.dim() - 1), each.dim() - 2) for each in cuts]
    spec_and_who = common(ones, (*lead, 1, 1))
    if spec_and_who is None:
        return gathered(func, name, args, kwargs)
    spec, who = spec_and_who
    region = spec.region
    parts = [fitted(x, region.spec(tuple(x.shape), spec.dim, spec.cut), who) for x in (a, b)]
    names = {"upper": True, "left": True, "unitriangular": False}
    options = {key: bool(arguments.get(key, default)) for key, default in names.items()}
    y = _Solved.apply(*parts, options)
    return cut_tensor(y, region.spec(tuple(b.shape), spec.dim, spec.cut), who)


def _solved(a: Tensor, b: Tensor, **options: bool) -> Tensor:
    """Solve one matrix after the other, each in its own memory.

    Torch's bits depend on the number of matrices in a batch and on where a matrix's memory begins.
    """
    if a.is_meta or not b.numel():
        return torch.linalg.solve_triangular(a, b, **options)
    shape = b.shape
    pairs = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
    y = torch.stack(
        [torch.linalg.solve_triangular(one.clone(), b.clone(), **options) for one, b in pairs]
    )
    return y.view(shape)


class _Solved(torch.autograd.Function):
    """`A @ Y = B`, or `Y @ A = B`; backward by another solve and a product of ours."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, options: dict[str, bool]) -> Tensor:
        y = _solved(a, b, **options)
        ctx.options = options
        ctx.save_for_backward(a, y)
        return y.data  # a new tensor: torch refuses in-place writes to a view here

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        a, y = ctx.saved_tensors
        upper, left, unit = (ctx.options[key] for key in ("upper", "left", "unitriangular"))
        grad_b = _solved(a.mT, grad, upper=not upper, left=left, unitriangular=unit)
        if not ctx.needs_input_grad[0]:
            return None, grad_b, None
        grad_a = -matmul(grad_b, y.mT) if left else -matmul(y.mT, grad_b)
        return (grad_a.triu(unit) if upper else grad_a.tril(-unit)), grad_b, None
