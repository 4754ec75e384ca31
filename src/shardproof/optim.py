"""The norm of all gradients of a cut model, clipping by it, and an optimizer's state with layouts.

Each element counts once: a cut parameter is summed over the axis by the canonical tree over its
leaves, a replicated one is summed on every rank alike and not over the axis. The parameters are
added in the order of `model.named_parameters()`, which no degree changes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof import comm, operands
from shardproof.axis import Axis
from shardproof.errors import LayoutError, UsageError
from shardproof.layers.base import ShardedModule
from shardproof.leaves import Layout
from shardproof.numerics.matmul import node_dtype
from shardproof.numerics.sums import sum_squares
from shardproof.tree import add_tensors, combine, nodes_of_run

_LAYOUTS = "layouts"


def layouts_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Layout, Axis | None]]:
    """Name, parameter, layout and axis of every parameter; plain ones are replicated.

    A parameter that several modules share comes once, under its first name, and is cut if any of
    them says so. A parameter that was added to a cut module is replicated.

    Raises:
        UsageError: a cut module no longer holds one of its parameters itself.
    """
    cut: dict[int, tuple[Layout, Axis]] = {
        id(parameter): (layout, module.axis)
        for module in model.modules()
        if isinstance(module, ShardedModule)
        for _, parameter, layout in module.cut_parameters()
    }
    for name, parameter in model.named_parameters():
        layout, axis = cut.get(id(parameter), (Layout(tuple(parameter.shape), 0), None))
        yield name, parameter, layout, axis


@torch.no_grad()
def grad_norm(model: nn.Module) -> Tensor:
    """2-norm of all gradients of a cut model, the same bits at every degree.

    Args:
        model: with cut and plain modules; parameters without a gradient count nothing. Gradients
            that are DTensors, as after `fully_shard`, are gathered one at a time, over their own
            mesh and past the ledger.

    Returns:
        (), Replicate, fp32 (fp64 if any gradient is).

    Raises:
        UsageError: `model` is not a module, a cut module no longer holds its own parameters, or a
            gradient is sparse or of a kind that cannot be read.

    Comm:
        update one all_reduce of () per cut parameter that has a gradient.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"grad_norm and clip_grad_norm_ take the model, got {type(model).__name__}: the "
            "modules know which parameters are cut. Write clip_grad_norm_(model, max_norm)."
        )
    total: Tensor | None = None
    for name, parameter, layout, axis in layouts_of(model):
        if parameter.grad is None:
            continue
        square = _sum_squares(_readable(parameter.grad, name), layout, axis, name)
        if total is not None and total.dtype != square.dtype:
            total, square = total.double(), square.double()
        total = square if total is None else total + square
    return torch.zeros(()) if total is None else total.sqrt()


def _readable(grad: Tensor, name: str) -> Tensor:
    """A gradient as real numbers in plain memory; a DTensor (FSDP) is gathered, one at a time."""
    if type(grad) is Tensor and grad.dtype in operands.FLOATS and not operands.is_odd(grad):
        return grad
    gather = getattr(grad, "full_tensor", None)
    whole: Tensor = grad if gather is None else gather()
    operands.check("grad_norm", **{f"{name}.grad": whole})
    return torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole


def _own_memory(grad: Tensor) -> Tensor:
    """What this rank has of a gradient, to be written."""
    local = getattr(grad, "to_local", None)
    mine: Tensor = grad if local is None else local()
    return mine


def _sum_squares(grad: Tensor, layout: Layout, axis: Axis | None, who: str) -> Tensor:
    """Sum of squares of one gradient, each element of the whole tensor once."""
    if layout.cut is None or layout.dim is None or axis is None:
        return sum_squares(grad)
    run = layout.cut.run(layout.rank)
    slices = layout.cut.leaf_slices(layout.rank, layout.held)
    leaves = {
        (leaf, leaf + 1): sum_squares(grad.narrow(layout.dim, at.start, at.stop - at.start))
        for leaf, at in zip(run, slices, strict=True)
    }
    count = layout.cut.num_leaves
    nodes = {node: combine(node, leaves, add_tensors) for node in nodes_of_run(count, run)}
    like = grad.new_empty(0, dtype=node_dtype(grad.dtype))
    return comm.all_reduce_nodes(
        nodes, axis, cut=layout.cut, shape=(), like=like, direction="update", who=who
    )


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients by `max_norm / norm` if their norm is larger; in place.

    Args:
        model: with cut and plain modules.
        max_norm: the largest norm allowed; positive.

    Returns:
        (), Replicate: the norm before clipping.

    Raises:
        UsageError: `model` is not a module, or `max_norm` is not positive.

    Comm:
        update one all_reduce of () per cut parameter that has a gradient.
    """
    if not max_norm > 0:
        raise UsageError(f"max_norm={max_norm} is not positive. Give the largest norm allowed.")
    norm = grad_norm(model)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            # Not rounded to the gradient's dtype first: the product is rounded anyway.
            mine = _own_memory(parameter.grad)
            mine.mul_(scale.to(mine.device))
    return norm


def optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()`, and the layout of every parameter that it updates.

    Momenta are cut as their parameters are, and look like another rank's. Load the state with
    `load_optimizer_state_dict`, which compares.

    Args:
        model: with cut and plain modules.
        optimizer: of parameters of `model`.

    Returns:
        Plain data and tensors, for `torch.save` and back with `weights_only=True`.

    Raises:
        UsageError: the optimizer has a parameter that the model has not.

    Comm:
        update none.
    """
    return {**optimizer.state_dict(), _LAYOUTS: _layouts_of_optimizer(model, optimizer)}


def load_optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    """Load what `optimizer_state_dict` gave on this rank, at this degree.

    State without layouts (of `optimizer.state_dict()`) is taken where there is one rank.

    Args:
        model: with cut and plain modules.
        optimizer: of parameters of `model`, in the order in which they were saved.
        state: what is to be loaded; on an error the optimizer stays as it was.

    Raises:
        LayoutError: the state belongs to other parameters, or to other parts of them.
        UsageError: the optimizer has a parameter that the model has not.

    Comm:
        update none.
    """
    mine = _layouts_of_optimizer(model, optimizer)
    if _LAYOUTS in state:
        _compare_layouts(state[_LAYOUTS], mine)
    elif any(layout.get("degree", 1) != 1 for layout in mine):
        raise LayoutError(
            f"cannot load optimizer state without {_LAYOUTS!r} for parameters that are cut: "
            "nothing tells it from another rank's. Save what "
            "shardproof.optimizer_state_dict(model, optimizer) gives."
        )
    optimizer.load_state_dict({key: value for key, value in state.items() if key != _LAYOUTS})


def _layouts_of_optimizer(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Name and layout of every parameter, in the order in which torch numbers its state."""
    known = {id(parameter): (name, layout) for name, parameter, layout, _ in layouts_of(model)}
    found = []
    for number, parameter in enumerate(
        p for group in optimizer.param_groups for p in group["params"]
    ):
        if id(parameter) not in known:
            raise UsageError(
                f"the optimizer's parameter {number} of shape {tuple(parameter.shape)} is not one "
                f"of {type(model).__name__}. Make the optimizer after the model is cut, from "
                "model.parameters()."
            )
        name, layout = known[id(parameter)]
        found.append({"name": name, **layout.state()})
    return found


def _compare_layouts(theirs: Any, mine: list[dict[str, Any]]) -> None:
    if not isinstance(theirs, list) or len(theirs) != len(mine):
        given = f"of {len(theirs)} parameters" if isinstance(theirs, list) else f"with {theirs!r}"
        raise LayoutError(
            f"cannot load optimizer state {given} into an optimizer of {len(mine)}. Load the state "
            "that this rank saved."
        )
    for saved, here in zip(theirs, mine, strict=True):
        if saved != here:
            raise LayoutError(
                f"cannot load the optimizer state of {here['name']!r}: it was saved for {saved}, "
                f"here is {here}. Load the state that this rank saved at this degree, with the "
                "same leaves, and give the optimizer the parameters in the same order."
            )
