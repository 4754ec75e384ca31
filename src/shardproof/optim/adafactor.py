"""Adafactor for cut parameters: the algorithm of torch 2.13, with the same bits at every degree.

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018
(https://arxiv.org/abs/1804.04235), in the variant of `torch.optim.Adafactor`: the squared gradient
is approximated by its row and column means, the step is relative to the size of the parameter, and
the update is clipped by its own size. The mean along the cut dim, the mean of the row means and
both sizes are sums over the ranks. All other steps are element-wise.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import UsageError
from shardproof.layers.step_guard import serve
from shardproof.leaves import Layout, replicated
from shardproof.numerics.precision import widen
from shardproof.numerics.sums import sum_rows, sum_squares, sum_squares_rows
from shardproof.optim.gradient_norms import sum_squares_of
from shardproof.optim.layouts import ParameterLayout
from shardproof.optim.whole_optimizer import WholeOptimizer, check_scalar, scalar, write

At = Callable[[Tensor], Tensor]


@serve
class Adafactor(WholeOptimizer):
    """`torch.optim.Adafactor` for models with or without cut parameters.

    Options and defaults are those of torch.

    Shapes and placements, of a matrix cut along dim 0 (column parallel):
        row_var   (owned, 1)                  Shard(0)
        col_var   (1, columns)                Replicate
    of a matrix cut along dim 1 (row parallel):
        row_var   (rows, 1)                   Replicate
        col_var   (1, owned)                  Shard(1)
    A vector has `variance`, with the placement of the vector; `step` is Replicate.

    Args:
        params: parameters, pairs of names and parameters, or groups of options.
        lr: the largest relative step.
        beta2_decay: exponent of the step number in the weight of the new mean; not positive.
        eps: the smallest variance (None for the eps of the dtype) and the smallest parameter size.
        d: largest size of an update, to which larger ones are scaled down.
        weight_decay: rate of weight decay, multiplied by `lr`.
        foreach: accepted for compatibility with torch; it has no effect.
        maximize: maximize the objective instead of minimizing it.

    Raises:
        UsageError: an option is out of range.

    Comm:
        update two all_reduces per cut parameter that has a gradient: of 2 + columns sums if it is
        cut along dim 0, of 1 + rows if along dim 1, of 1 if it is a vector; and of ().
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        check_scalar("lr", lr)
        check_scalar("eps[0]", 0.0 if eps[0] is None else eps[0])
        check_scalar("eps[1]", eps[1])
        check_scalar("d", d, least=1.0)
        check_scalar("weight_decay", weight_decay)
        if not beta2_decay <= 0:
            raise UsageError(f"beta2_decay={beta2_decay} is positive. Give 0 or less.")
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def state_layouts(self, layout: Layout) -> dict[str, Layout]:
        """The layouts of the state of a parameter with this layout: key -> layout."""
        if len(layout.shape) < 2:
            return {"step": replicated(()), "variance": layout}
        return {
            "step": replicated(()),
            "row_var": _without(layout, len(layout.shape) - 1),
            "col_var": _without(layout, len(layout.shape) - 2),
        }

    def _update(self, parameter: Tensor, group: dict[str, Any], place: ParameterLayout) -> None:
        local_grad: Any = parameter.grad
        grad = widen(local_grad.neg() if group["maximize"] else local_grad)
        state = self.state[parameter]
        if not state:
            state.update(_first_state(parameter))
        state["step"] += 1
        step = state["step"].item()
        weight, lr = widen(parameter), group["lr"]
        floor = group["eps"][0]
        floor = torch.finfo(parameter.dtype).eps if floor is None else floor

        is_new = step ** group["beta2_decay"]
        if grad.dim() > 1:
            size, variance = _factored(weight, grad, state, is_new, floor, place)
        else:
            size = sum_squares_of(weight, place)
            mixed = widen(state["variance"]).lerp_(grad * grad, is_new)
            write(state["variance"], mixed)
            variance = state["variance"].to(grad.dtype, copy=True)

        root_numel = math.prod(place.layout.shape) ** 0.5
        relative = min(scalar(lr), 1 / step**0.5)
        alpha = max(group["eps"][1], size.sqrt().item() / root_numel) * relative
        if group["weight_decay"] != 0:
            weight.mul_(scalar(1 - lr * group["weight_decay"]))
        update = variance.clamp_(min=floor * floor).rsqrt_().mul_(grad)
        length = sum_squares_of(update, place).sqrt().item()
        weight.add_(update, alpha=-alpha / max(1.0, length / (root_numel * group["d"])))
        write(parameter, weight)


def _first_state(parameter: Tensor) -> dict[str, Tensor]:
    is_double = torch.get_default_dtype() == torch.float64
    step = torch.tensor(0.0, dtype=torch.float64 if is_double else torch.float32)
    shape = list(parameter.shape)
    if len(shape) < 2:
        return {"step": step, "variance": torch.zeros_like(parameter)}
    return {
        "step": step,
        "row_var": parameter.new_zeros([*shape[:-1], 1]),
        "col_var": parameter.new_zeros([*shape[:-2], 1, shape[-1]]),
    }


def _factored(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    is_new: float,
    floor: float,
    place: ParameterLayout,
) -> tuple[Tensor, Tensor]:
    """Update the row and column means.

    Returns:
        The sum of squares of the whole parameter, and the variance of this rank's part.
    """
    dims, dim = grad.dim(), place.layout.dim if place.is_cut else None
    sums_rows, sums_columns = dim == dims - 1, dim == dims - 2
    if not sums_rows:  # this rank has whole rows
        _mix(state["row_var"], _row_squares(grad), is_new, place.layout.shape[-1])

    def partial(at: At) -> Tensor:
        parts = [sum_squares(at(weight)).view(1)]
        if sums_rows:
            parts.append(_row_squares(at(grad)).view(-1))
        elif sums_columns:
            parts += [_row_sum(at(state["row_var"])), _column_squares(at(grad))]
        return torch.cat([part.reshape(-1) for part in parts])

    rows, columns = math.prod(state["row_var"].shape), math.prod(state["col_var"].shape)
    extra = rows if sums_rows else columns + math.prod(grad.shape[:-2]) if sums_columns else 0
    sums = place.sum(partial, shape=(1 + extra,), like=grad)
    if sums_rows:
        _mix(state["row_var"], sums[1:], is_new, place.layout.shape[-1])
    row_total = _row_sum(state["row_var"])
    column_squares = _column_squares(grad) if not sums_columns else sums[-columns:]
    if sums_columns:
        row_total = sums[1:-columns]
    _mix(state["col_var"], column_squares, is_new, place.layout.shape[-2])
    mean = row_total.view(*grad.shape[:-2], 1, 1).div(place.layout.shape[-2]).clamp_(min=floor)
    variance = torch.mul(widen(state["row_var"]), widen(state["col_var"])).div_(mean)
    return sums[0], variance


def _mix(mean: Tensor, sums: Tensor, is_new: float, count: int) -> None:
    """Update a running mean in place with the mean of `count` values, given their sums."""
    write(mean, widen(mean).lerp_(sums.view(mean.shape).div(count), is_new))


def _row_squares(x: Tensor) -> Tensor:
    """(*, rows, columns) -> (* x rows,): squares summed over the last dim."""
    return sum_squares_rows(x.movedim(-1, 0).flatten(1))


def _column_squares(x: Tensor) -> Tensor:
    """(*, rows, columns) -> (* x columns,): squares summed over the last dim but one."""
    return sum_squares_rows(x.movedim(-2, 0).flatten(1))


def _row_sum(row_var: Tensor) -> Tensor:
    """(*, rows, 1) -> (*,): summed over the rows."""
    return sum_rows(widen(row_var).movedim(-2, 0).flatten(1))


def _without(layout: Layout, dim: int) -> Layout:
    """The layout of the mean over one dim of a parameter."""
    shape = (*layout.shape[:dim], 1, *layout.shape[dim + 1 :])
    if layout.dim is None or layout.dim == dim:
        return Layout(shape, layout.rank)
    return layout.reshaped(shape)
