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
from shardproof.errors import ShapeError, UsageError
from shardproof.leaves import Cut, Layout
from shardproof.numerics.precision import widen
from shardproof.numerics.sums import sum_all
from shardproof.objects import checked_model
from shardproof.optim.layouts import layouts_of
from shardproof.runs import take
from shardproof.tree import add_run
from shardproof.wording import shown

Function = Callable[[Tensor], Tensor]
_SAMPLE = 7  # elements of a leaf, at least, on which a function is tried
Of = Literal["parameters", "gradients"]


def num_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """How many elements the parameters of the whole model have, each counted once.

    Args:
        model: with cut and plain modules.
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
    """Sum of `function` over every element of every parameter; may stand in a loss.

    Args:
        model: with cut and plain modules.
        function: element-wise, such as `torch.square`; booleans and integers are counted in fp64.
        of: "parameters", or "gradients"; what has no gradient counts nothing.
        only_trainable: leave out what needs no gradient.

    Returns:
        (), Replicate. The gradient that each parameter gets is that of its shard, and needs no
        further sum: do not add it over the axis.

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
        model: with cut and plain modules.
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
    """2-norm of all parameters of a cut model; may stand in a loss.

    Args:
        model: with cut and plain modules.

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
        model: with cut and plain modules.
        of: "parameters" or "gradients"; what has no gradient is left out.

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
        model: with cut and plain modules.
        function: element-wise, such as `torch.abs`; by default the element itself.
        of: "parameters" or "gradients".

    Returns:
        (), Replicate, fp64, which is as wide as two of fp32; -inf if there is no element.

    Raises:
        UsageError: as for `sum_over_parameters`.
        ShapeError: as there.

    Comm:
        update one all_gather of (2 * ranks).
    """
    apply = _itself if function is None else function
    largest = torch.full((), -torch.inf, dtype=torch.float64)
    mine: dict[int, tuple[Axis, Tensor]] = {}
    for name, value, layout, axis in _values(model, of, False, "max_over_parameters"):
        here = largest.new_full((), -torch.inf)
        for leaf in _leaves(value, layout):
            if leaf.numel():
                here = torch.maximum(here, _applied(apply, leaf, name).amax().double().cpu())
        if axis is None:
            largest = torch.maximum(largest, here)
        else:
            before = mine.get(id(axis), (axis, here))[1]
            mine[id(axis)] = (axis, torch.maximum(before, here))
    for axis, here in mine.values():
        cut = Cut(axis.size, axis.size, axis.size)
        found = comm.all_gather(
            here.view(1), axis, dim=0, cut=cut, direction="update", who="max_over_parameters"
        )
        largest = torch.maximum(largest, found.amax())
    return largest


def min_over_parameters(
    model: nn.Module, function: Function | None = None, *, of: Of = "parameters"
) -> Tensor:
    """Smallest value of `function` over every element; NaN if one is NaN.

    Args:
        model: with cut and plain modules.
        function: element-wise; by default the element itself.
        of: "parameters" or "gradients".

    Returns:
        (), Replicate, fp64, which is as wide as two of fp32; inf if there is no element.

    Raises:
        UsageError: as for `sum_over_parameters`.
        ShapeError: as there.

    Comm:
        update one all_gather of (2 * ranks).
    """
    apply = _itself if function is None else function
    return -max_over_parameters(model, lambda x: -apply(x).double(), of=of)


class _Total(torch.autograd.Function):
    """Sum by the tree over the leaves of all ranks forward, a copy to every leaf backward.

    A rank may hold what another owns, behind its own leaves: that is not added here, and gets its
    gradient too.
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
    """Name -> sum over the whole of one parameter."""
    found = {}
    for name, value, layout, axis in _values(model, of, only_trainable, who):
        parts = [_leaf_sum(_applied(function, leaf, name)) for leaf in _leaves(value, layout)]
        if axis is None:
            found[name] = parts[0]
            continue
        # Without a leaf, this rank's part is empty, and must need a gradient as the others' do.
        held = torch.stack(parts) if parts else _leaf_values(function(value)).reshape(-1)[:0]
        found[name] = _Total.apply(held, layout, axis, name)
    return found


def _leaf_values(y: Tensor) -> Tensor:
    """What is added up: counts in fp64, which is exact to 2^53, bf16 and fp16 in fp32."""
    return widen(y) if y.is_floating_point() else y.double()


def _leaf_sum(y: Tensor) -> Tensor:
    return sum_all(_leaf_values(y))


def _applied(function: Function, leaf: Tensor, name: str) -> Tensor:
    if not callable(function):
        raise UsageError(f"{shown(function)} is no function of each element, as torch.square is.")
    y = function(leaf)
    if not isinstance(y, Tensor) or y.shape != leaf.shape:
        given = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"the function given for parameter {name!r} returned {given} for a leaf of shape "
            f"{tuple(leaf.shape)}. Give one that is element-wise, such as torch.square: the sum is "
            "made here."
        )
    if function not in (_square, _itself):  # our own are known
        _check_elementwise(function, leaf, y, name)
    return y


@torch.no_grad()
def _check_elementwise(function: Function, leaf: Tensor, y: Tensor, name: str) -> None:
    """Raise unless a few elements alone give what they gave among all; a draw gives something else.

    Elements far apart, and in another shape: what looks at its neighbours or at a place is found.
    """
    step = max(1, leaf.numel() // _SAMPLE)
    found = function(leaf.detach().reshape(-1)[::step].clone())
    wanted = y.detach().reshape(-1)[::step]
    if found.shape == wanted.shape and torch.allclose(
        found.double(), wanted.double(), rtol=1e-3, atol=1e-6, equal_nan=True
    ):
        return
    raise ShapeError(
        f"the function given for parameter {name!r} is not element-wise: of a few elements alone "
        "it makes something else than of the same ones in a leaf. Give one that is, such as "
        "torch.square: the sum is made here, over leaves of a size that the plan fixes."
    )


def _leaves(value: Tensor, layout: Layout) -> list[Tensor]:
    """The leaves that this rank owns, and what it holds of others as one more.

    They are contiguous, so that no shard is seen in their strides.
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
    """Name, parameter or gradient, layout, and the axis over which it is cut."""
    if of not in ("parameters", "gradients"):
        raise UsageError(f"{who}: of={of!r} is unknown. Use 'parameters' or 'gradients'.")
    for name, parameter, layout, axis in _parameters(model, who):
        if only_trainable and not parameter.requires_grad:
            continue
        value = parameter if of == "parameters" else parameter.grad
        if value is not None:
            operands.check(who, **{name: value})  # of a DTensor, which FSDP makes, a part is here
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
