"""Numbers about all parameters of a cut model: counts, sums, norms, extremes.

`sum(p.pow(2).sum() for p in model.parameters())` on a rank is that rank's share. Here each element
of each parameter counts once: a cut parameter is summed leaf by leaf and then over the axis by the
canonical tree, a replicated one on every rank alike, and the parameters are added in the order of
`model.named_parameters()`. So every rank has the same number, with the same bits at every degree.

A function that is given here must be element-wise, as `torch.square` is: it is called with one leaf
at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardproof import comm, operands
from shardproof.axis import Axis
from shardproof.checked_objects import checked_model
from shardproof.errors import ShapeError, UsageError
from shardproof.index_runs import take
from shardproof.leaves import Cut, Layout
from shardproof.numerics.precision import widen
from shardproof.numerics.sums import sum_all
from shardproof.optim.layouts import layouts_of
from shardproof.tree import add_run
from shardproof.wording import short_repr

Function = Callable[[Tensor], Tensor]
_SAMPLE = 7  # elements of a leaf, at least, on which a function is tried
Of = Literal["parameters", "gradients"]


def num_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """How many elements the parameters of the whole model have, each counted once.

    Args:
        model: a model with cut and plain modules.
        only_trainable: leave out what needs no gradient.

    Returns:
        The same on every rank, and at every degree.

    Raises:
        UsageError: `model` is not a module, or a cut module no longer holds its own parameters.

    Comm:
        update none.
    """
    return sum(
        torch.Size(layout.shape).numel()
        for _, parameter, layout, _ in _parameters(model, "num_parameters")
        if parameter.requires_grad or not only_trainable
    )


def sum_over_parameters(
    model: nn.Module, function: Function, *, of: Of = "parameters", only_trainable: bool = False
) -> Tensor:
    """Sum of `function` over all elements of all parameters; it can be part of a loss.

    Args:
        model: a model with cut and plain modules.
        function: element-wise, such as `torch.square`; booleans and integers are counted in fp64.
        of: "parameters" or "gradients"; parameters without a gradient are skipped.
        only_trainable: skip parameters that need no gradient.

    Returns:
        (), Replicate. Each parameter gets the gradient of its shard; do not sum that over the axis.

    Raises:
        UsageError: `model` is not a module, `of` is neither, or a cut module no longer holds its
            own parameters.
        ShapeError: `function` does not return one value for each element.

    Comm:
        update one all_reduce of () per cut parameter; backward none.

    Example:
        penalty = 1e-4 * shardproof.sum_over_parameters(model, torch.square)
        (loss + penalty).backward()
    """
    sums = _sums(model, function, of, only_trainable, "sum_over_parameters")
    total: Tensor | None = None
    for each in sums.values():
        if total is not None and total.dtype != each.dtype:
            total, each = total.double(), each.double()
        total = each if total is None else total + each
    return torch.zeros(()) if total is None else total


def sums_by_parameter(
    model: nn.Module, function: Function, *, of: Of = "parameters"
) -> dict[str, Tensor]:
    """`sum_over_parameters`, for each parameter by itself.

    Args:
        model: a model with cut and plain modules.
        function: element-wise.
        of: "parameters" or "gradients".

    Returns:
        Name of a parameter -> (), Replicate.

    Raises:
        UsageError: as for `sum_over_parameters`.
        ShapeError: as there.

    Comm:
        update one all_reduce of () per cut parameter; backward none.
    """
    return _sums(model, function, of, False, "sums_by_parameter")


def parameter_norm(model: nn.Module) -> Tensor:
    """2-norm of all parameters of a cut model; it can be part of a loss.

    Args:
        model: a model with cut and plain modules.

    Returns:
        (), Replicate.

    Raises:
        UsageError: `model` is not a module, or a cut module no longer holds its own parameters.

    Comm:
        update one all_reduce of () per cut parameter; backward none.
    """
    return sum_over_parameters(model, _square).sqrt()


@torch.no_grad()
def parameter_norms(model: nn.Module, *, of: Of = "parameters") -> dict[str, Tensor]:
    """2-norm of every parameter, or of every gradient, for logging.

    Args:
        model: a model with cut and plain modules.
        of: "parameters" or "gradients"; parameters without a gradient are skipped.

    Returns:
        Name of a parameter -> (), Replicate.

    Raises:
        UsageError: `model` is not a module, `of` is neither, or a cut module no longer holds its
            own parameters.

    Comm:
        update one all_reduce of () per cut parameter.
    """
    sums = _sums(model, _square, of, False, "parameter_norms")
    return {name: total.sqrt() for name, total in sums.items()}


@torch.no_grad()
def max_over_parameters(
    model: nn.Module, function: Function | None = None, *, of: Of = "parameters"
) -> Tensor:
    """Largest value of `function` over every element; NaN if one is NaN.

    Args:
        model: a model with cut and plain modules.
        function: element-wise, such as `torch.abs`; by default the element itself.
        of: "parameters" or "gradients".

    Returns:
        (), Replicate, fp64; -inf if there is no element.

    Raises:
        UsageError: as for `sum_over_parameters`.
        ShapeError: as there.

    Comm:
        update one all_gather of (2 * ranks).
    """
    apply = _itself if function is None else function
    largest = torch.full((), -torch.inf, dtype=torch.float64, device="cpu")
    mine: dict[int, tuple[Axis, Tensor]] = {}
    for name, value, layout, axis in _values(model, of, False, "max_over_parameters"):
        # On the parameter's device: a process group of nccl alone sends nothing from the CPU.
        here = largest.new_full((), -torch.inf, device=value.device)
        for leaf in _leaves(value, layout):
            if leaf.numel():
                here = torch.maximum(here, _applied(apply, leaf, name).amax().double())
        if axis is None:
            largest = torch.maximum(largest, here.cpu())
        else:
            before = mine.get(id(axis), (axis, here))[1]
            mine[id(axis)] = (axis, torch.maximum(before.to(here.device), here))
    for axis, here in mine.values():
        cut = Cut(axis.size, axis.size, axis.size)
        maxima = comm.all_gather(
            here.view(1), axis, dim=0, cut=cut, direction="update", who="max_over_parameters"
        )
        largest = torch.maximum(largest, maxima.amax().cpu())
    return largest


def min_over_parameters(
    model: nn.Module, function: Function | None = None, *, of: Of = "parameters"
) -> Tensor:
    """Smallest value of `function` over every element; NaN if one is NaN.

    Args:
        model: a model with cut and plain modules.
        function: element-wise; by default the element itself.
        of: "parameters" or "gradients".

    Returns:
        (), Replicate, fp64; inf if there is no element.

    Raises:
        UsageError: as for `sum_over_parameters`.
        ShapeError: as there.

    Comm:
        update one all_gather of (2 * ranks).
    """
    apply = _itself if function is None else function
    return -max_over_parameters(model, lambda x: -apply(x).double(), of=of)


class _TreeTotal(torch.autograd.Function):
    """Sum over the leaves of all ranks by the tree forward, a copy to every leaf backward.

    A rank may hold parts that another rank owns, after its own leaves. They are not added here, but
    get their gradient too.
    """

    @staticmethod
    def forward(ctx: Any, held: Tensor, layout: Layout, axis: Axis, who: str) -> Tensor:
        cut: Any = layout.cut
        ctx.count = held.shape[0]
        run = cut.run(layout.rank)
        leaves = (held[number].clone() for number in range(len(run)))
        nodes = add_run(leaves, run, cut.num_leaves)
        return comm.all_reduce_nodes(
            nodes, axis, cut=cut, shape=(), like=held.new_empty(0), direction="update", who=who
        )

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_y.expand(ctx.count), None, None, None


def _sums(
    model: nn.Module, function: Function, of: Of, only_trainable: bool, who: str
) -> dict[str, Tensor]:
    """Name -> sum over one whole parameter."""
    sums = {}
    for name, value, layout, axis in _values(model, of, only_trainable, who):
        parts = [_leaf_sum(_applied(function, leaf, name)) for leaf in _leaves(value, layout)]
        if axis is None:
            sums[name] = parts[0]
            continue
        # Without a leaf this part is empty, but must need a gradient like those of other ranks.
        leaf_sums = torch.stack(parts) if parts else _leaf_values(function(value)).reshape(-1)[:0]
        sums[name] = _TreeTotal.apply(leaf_sums, layout, axis, name)
    return sums


def _leaf_values(y: Tensor) -> Tensor:
    """The values in the dtype of the sum: fp64 for counts (exact to 2^53), fp32 for 16 bits."""
    return widen(y) if y.is_floating_point() else y.double()


def _leaf_sum(y: Tensor) -> Tensor:
    return sum_all(_leaf_values(y))


def _applied(function: Function, leaf: Tensor, name: str) -> Tensor:
    if not callable(function):
        raise UsageError(
            f"{short_repr(function)} is no function of each element, as torch.square is."
        )
    y = function(leaf)
    if not isinstance(y, Tensor) or y.shape != leaf.shape:
        description = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"the function given for parameter {name!r} returned {description} for a leaf of shape "
            f"{tuple(leaf.shape)}. Give one that is element-wise, such as torch.square: the sum is "
            "made here."
        )
    if function not in (_square, _itself):  # our own are known
        _check_elementwise(function, leaf, y, name)
    return y


@torch.no_grad()
def _check_elementwise(function: Function, leaf: Tensor, y: Tensor, name: str) -> None:
    """Raise unless the function gives the same values for a few elements alone.

    The elements are far apart and in another shape, so that a function of neighbours, of positions
    or of random draws is found.
    """
    step = max(1, leaf.numel() // _SAMPLE)
    some_values = function(leaf.detach().reshape(-1)[::step].clone())
    sample = y.detach().reshape(-1)[::step]
    if some_values.shape == sample.shape and torch.allclose(
        some_values.double(), sample.double(), rtol=1e-3, atol=1e-6, equal_nan=True
    ):
        return
    raise ShapeError(
        f"the function given for parameter {name!r} is not element-wise: of a few elements alone "
        "it makes something else than of the same ones in a leaf. Give one that is, such as "
        "torch.square: the sum is made here, over leaves of a size that the plan fixes."
    )


def _leaves(value: Tensor, layout: Layout) -> list[Tensor]:
    """The leaves that this rank owns, and as one more leaf the parts of others that it holds.

    They are contiguous, so that their strides do not depend on the shard.
    """
    if layout.dim is None:
        return [value.contiguous()]
    others = [layout.other_places] if layout.other_places else []
    return [
        take(value, layout.dim, places).contiguous() for places in (*layout.leaf_places, *others)
    ]


def _values(
    model: nn.Module, of: Of, only_trainable: bool, who: str
) -> Iterator[tuple[str, Tensor, Layout, Axis | None]]:
    """Yield name, parameter or gradient, layout, and the axis that cuts it."""
    if of not in ("parameters", "gradients"):
        raise UsageError(f"{who}: of={of!r} is unknown. Use 'parameters' or 'gradients'.")
    for name, parameter, layout, axis in _parameters(model, who):
        if only_trainable and not parameter.requires_grad:
            continue
        value = parameter if of == "parameters" else parameter.grad
        if value is not None:
            operands.check(
                who, **{name: value}
            )  # this rank has only a part of a DTensor, as FSDP makes it
            yield name, value, layout, None if layout.is_replicated else axis


def _parameters(
    model: nn.Module, who: str
) -> Iterator[tuple[str, nn.Parameter, Layout, Axis | None]]:
    way_out = "Give the model: its modules know which parameters are cut."
    return layouts_of(checked_model(model, what=f"the model of {who}", way_out=way_out))


def _square(x: Tensor) -> Tensor:
    wide = widen(x)
    return wide * wide


def _itself(x: Tensor) -> Tensor:
    return x
