"""The norm of all gradients of a cut model, and clipping by it.

Each element counts once: a cut parameter is summed over the axis by the canonical tree over its
leaves; a replicated parameter is summed on every rank alike, and not over the axis. The parameters
are added in the order of `model.named_parameters()`, which does not depend on the degree.
"""

import torch
from torch import Tensor, nn

from shardproof import operands
from shardproof.checked_objects import checked_model
from shardproof.checked_values import checked_real
from shardproof.numerics.sums import sum_squares
from shardproof.optim.layouts import ParameterLayout, layouts_of


@torch.no_grad()
def grad_norm(model: nn.Module) -> Tensor:
    """2-norm of all gradients of a cut model, the same bits at every degree.

    Args:
        model: a model with cut and plain modules; parameters without a gradient are skipped.
            Gradients that are DTensors, as after `fully_shard`, are gathered one at a time, over
            their own mesh and without the ledger.

    Returns:
        (), Replicate, fp32 (fp64 if any gradient is).

    Raises:
        UsageError: `model` is not a module, a cut module no longer holds its own parameters, or a
            gradient is sparse or of a kind that cannot be read.

    Comm:
        update one all_reduce of () per cut parameter that has a gradient.
    """
    checked_model(
        model,
        what="the model of grad_norm or clip_grad_norm_",
        way_out="Modules know which parameters are cut: write clip_grad_norm_(model, max_norm).",
    )
    total: Tensor | None = None
    for name, parameter, layout, axis in layouts_of(model):
        if parameter.grad is None:
            continue
        square = sum_squares_of(
            _readable(parameter.grad, name), ParameterLayout(layout, axis, name)
        )
        if total is not None and total.dtype != square.dtype:
            total, square = total.double(), square.double()
        total = square if total is None else total + square
    return torch.zeros(()) if total is None else total.sqrt()


def _readable(grad: Tensor, name: str) -> Tensor:
    """A gradient as a plain tensor; a DTensor (FSDP) is gathered."""
    if type(grad) is Tensor and grad.dtype in operands.FLOATS and not operands.is_odd(grad):
        return grad
    gather = getattr(grad, "full_tensor", None)
    whole: Tensor = grad if gather is None else gather()
    operands.check("grad_norm", **{f"{name}.grad": whole})
    return torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole


def _own_memory(grad: Tensor) -> Tensor:
    """The memory of this rank's part of a gradient, for writing."""
    local = getattr(grad, "to_local", None)
    mine: Tensor = grad if local is None else local()
    return mine


def sum_squares_of(x: Tensor, place: ParameterLayout) -> Tensor:
    """Sum of the squares of a whole tensor, each element once.

    Args:
        x: this rank's part of it, cut as the parameter is.
        place: layout of the parameter.

    Returns:
        (), Replicate; fp64 for fp64, else fp32.

    Comm:
        update one all_reduce of ().
    """
    return place.sum(lambda at: sum_squares(at(x)), shape=(), like=x)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients by `max_norm / norm` if their norm is larger; in place.

    Args:
        model: a model with cut and plain modules.
        max_norm: the largest norm allowed; positive.

    Returns:
        (), Replicate: the norm before clipping.

    Raises:
        UsageError: `model` is not a module, or `max_norm` is not positive.

    Comm:
        update one all_reduce of () per cut parameter that has a gradient.
    """
    rule = "positive. Give the largest norm allowed"
    max_norm = checked_real(max_norm, "max_norm", rule=rule, holds=lambda number: number > 0)
    norm = grad_norm(model)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            # Not rounded to the gradient's dtype first: the product is rounded anyway.
            mine = _own_memory(parameter.grad)
            mine.mul_(scale.to(mine.device))
    return norm
