"""Muon for cut parameters: the algorithm of torch 2.13, with the same bits at every degree.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/); "match_rms_adamw": Liu et al., "Muon is Scalable for
LLM Training", 2025 (https://arxiv.org/abs/2502.16982). The momentum of a matrix is replaced by the
nearest orthogonal matrix (`orthogonal.py`). A matrix that is cut along its shorter side is first
cut along the longer side, by one all-to-all of blocks; its update is sent back in the same way.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from shardproof.axis import Axis
from shardproof.block_layout import BlockLayout
from shardproof.comm.runs_of_indices import move
from shardproof.errors import UsageError
from shardproof.index_runs import take
from shardproof.layers.step_guard import serve
from shardproof.leaves import Cut, Layout
from shardproof.numerics.precision import widen
from shardproof.optim.gradient_norms import sum_squares_of
from shardproof.optim.layouts import ParameterLayout
from shardproof.optim.orthogonal import Iteration, orthogonalize, spread_of
from shardproof.optim.whole_optimizer import WholeOptimizer, check_scalar, scalar, write
from shardproof.recut import to_columns, to_rows
from shardproof.transport.base import Call

_RATES = ("original", "match_rms_adamw")
_SOLO = Axis.solo("alone")


@serve
class Muon(WholeOptimizer):
    """`torch.optim.Muon` for models with or without cut matrices.

    Options and defaults are those of torch, with `ns_dtype` in addition. The learning rate is
    adjusted by the shape of the whole matrix, not of this rank's part.

    Shapes and placements:
        momentum_buffer   as the parameter

    Args:
        params: matrices, pairs of names and matrices, or groups of options.
        lr: the learning rate.
        weight_decay: rate of weight decay, multiplied by `lr`.
        momentum: momentum of the gradients.
        nesterov: whether to use Nesterov momentum.
        ns_coefficients: a, b and c of the iteration.
        eps: the smallest divisor of the normalisation.
        ns_steps: number of iterations; below 100.
        adjust_lr_fn: "original" (None is the same) or "match_rms_adamw".
        ns_dtype: dtype to which the iteration rounds (torch: always bf16); None for no rounding.

    Raises:
        UsageError: an option is out of range, or a parameter is not a matrix.

    In `Comm`, a matrix is (short, long). Each iteration makes two products. A matrix that is cut
    along its shorter side is turned twice; a matrix whose cut dim has several blocks is turned
    twice more. A (short, short) matrix that is larger than a rank's share is sent in parts.

    Comm:
        update one all_reduce of () per cut parameter that has a gradient; update one
        reduce_scatter of (short, short) per iteration; update one all_gather of (short, short) per
        product; update one exchange of (short, long) per turn.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        check_scalar("lr", lr)
        check_scalar("momentum", momentum)
        check_scalar("weight_decay", weight_decay)
        if adjust_lr_fn is not None and adjust_lr_fn not in _RATES:
            raise UsageError(f"adjust_lr_fn={adjust_lr_fn!r} is unknown. Use one of {_RATES}.")
        if len(ns_coefficients) != 3:
            raise UsageError(f"ns_coefficients={ns_coefficients} are not three. Give a, b and c.")
        if not 0 <= ns_steps < 100:
            raise UsageError(f"ns_steps={ns_steps} is not from 0 to 99. Five are usual.")
        if ns_dtype is not None and not ns_dtype.is_floating_point:
            raise UsageError(
                f"ns_dtype={ns_dtype} is no dtype of real numbers. Use torch.bfloat16."
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
        }
        self._held: Any = WeakIdKeyDictionary()  # parameter -> the leaves that each rank holds
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_held", WeakIdKeyDictionary())
        for group in self.param_groups:
            group.setdefault(
                "ns_dtype", torch.bfloat16
            )  # the state may come from torch's optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which must be matrices.

        Raises:
            UsageError: a parameter is not a matrix.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() != 2:
                self.param_groups.pop()
                raise UsageError(
                    f"Muon got a parameter of shape {tuple(parameter.shape)}, and orthogonalises "
                    "matrices. Give it [p for p in model.parameters() if p.ndim == 2], and the "
                    "rest to torch.optim.AdamW."
                )

    def state_layouts(self, layout: Layout) -> dict[str, Layout]:
        """The momentum has the layout of its parameter."""
        return {"momentum_buffer": layout}

    def _update(self, parameter: Tensor, group: dict[str, Any], place: ParameterLayout) -> None:
        local_grad: Any = parameter.grad
        grad, momentum = widen(local_grad), group["momentum"]
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(local_grad)
        buffer = widen(state["momentum_buffer"]).lerp_(grad, 1 - momentum)
        write(state["momentum_buffer"], buffer)
        ahead = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        update = self._orthogonal(parameter, ahead, group, place)
        lr, shape = group["lr"], place.layout.shape
        weight = widen(parameter).mul_(scalar(1 - lr * group["weight_decay"]))
        weight.add_(update, alpha=-scalar(lr * _rate(group["adjust_lr_fn"], shape)))
        write(parameter, weight)

    def _orthogonal(
        self, parameter: Tensor, ahead: Tensor, group: dict[str, Any], place: ParameterLayout
    ) -> Tensor:
        """The update of this rank's part, in the dtype of the computation."""
        layout, axis = place.layout, place.axis if place.is_cut else None
        if isinstance(layout, BlockLayout) and axis is not None:
            return self._in_one_run(parameter, ahead, group, place, layout, axis)
        if not math.prod(layout.shape):
            return ahead
        dtype = group["ns_dtype"] or ahead.dtype
        iteration = Iteration(tuple(group["ns_coefficients"]), group["ns_steps"], dtype)
        x = widen(ahead.to(dtype))
        norm = sum_squares_of(x, place).sqrt().to(dtype).clamp(min=group["eps"]).to(x.dtype)
        x = iteration.round(x / norm)
        rows, columns = layout.shape
        is_turned = rows > columns
        short, long = (columns, rows) if is_turned else (rows, columns)
        if is_turned:
            x = x.t()
        if axis is None or layout.cut is None:
            spread = spread_of(Cut(long, 1, 1), Cut(short, 1, 1), 0, range(1), place.name)
            x = orthogonalize(x.contiguous(), spread, iteration, _SOLO)
        else:
            long_dim = 0 if is_turned else 1
            mine = layout.cut if layout.dim == long_dim else None
            x = self._on_axis(parameter, x, (short, long), mine, iteration, place, axis)
        return x.t() if is_turned else x

    def _in_one_run(
        self,
        parameter: Tensor,
        ahead: Tensor,
        group: dict[str, Any],
        place: ParameterLayout,
        layout: BlockLayout,
        axis: Axis,
    ) -> Tensor:
        """`_orthogonal` of a matrix whose cut dim has several blocks, which is cut anew first.

        Every rank receives one run of the dim, and afterwards sends the parts of the others back.
        """
        along: Any = layout.along
        dim, ranks = layout.dim or 0, range(axis.size)
        cut = Cut(along.size, along.shared.leaves, axis.size)
        runs = [np.arange(run.start, run.stop) for run in map(cut.owned, ranks)]
        route: dict[str, Any] = {"dim": dim, "direction": "update", "who": place.name}
        own = take(ahead, dim, layout.owned_places)
        own = move(own, axis, have=[along.owned(rank) for rank in ranks], want=runs, **route)
        even = ParameterLayout(Layout(layout.shape, axis.rank, dim, cut), axis, place.name)
        update = self._orthogonal(parameter, own, group, even)
        held = [along.held(rank) for rank in ranks]
        return move(update, axis, have=runs, want=held, **route)

    def _on_axis(
        self,
        parameter: Tensor,
        x: Tensor,
        shape: tuple[int, int],
        cut: Cut | None,
        iteration: Iteration,
        place: ParameterLayout,
        axis: Axis,
    ) -> Tensor:
        """Iterate a cut matrix (short, long); `cut` is the cut of the longer side, or None."""
        layout: Any = place.layout
        leaves, degree, rank = layout.cut.leaves, axis.size, axis.rank
        rows = Cut(shape[0], leaves, degree)
        if cut is not None:
            spread = spread_of(cut, rows, rank, layout.held, place.name)
            return orthogonalize(x.contiguous(), spread, iteration, axis)
        columns = Cut(shape[1], leaves, degree)
        spread = spread_of(columns, rows, rank, columns.run(rank), place.name)
        held = self._leaves_held(parameter, layout, axis)
        own = _owned_rows(x, layout)
        route: dict[str, Any] = {
            "rows": layout.cut, "columns": columns, "direction": "update", "who": place.name
        }  # fmt: skip
        y = orthogonalize(to_columns(own, axis, **route), spread, iteration, axis)
        return to_rows(y, axis, held=held, **route)

    def _leaves_held(self, parameter: Tensor, layout: Layout, axis: Axis) -> tuple[range, ...]:
        """The leaves of a parameter that each rank holds, in rank order."""
        cut: Any = layout.cut
        if cut.runs is None:
            return tuple(cut.run(rank) for rank in range(cut.degree))
        if parameter not in self._held:
            call = Call("held", "setup", f"{type(self).__name__} of {layout.shape}")
            self._held[parameter] = tuple(axis.transport.gather_objects(layout.held, call=call))
        held: tuple[range, ...] = self._held[parameter]
        return held


def _owned_rows(x: Tensor, layout: Any) -> Tensor:
    """The owned rows of this rank's part of a matrix cut along dim 0."""
    owned, held = layout.owned, layout.held_indices
    return x.narrow(0, owned.start - held.start if owned else 0, len(owned))


def _rate(rule: str | None, shape: tuple[int, ...]) -> float:
    """The factor by which a rule adjusts the learning rate of a matrix."""
    rows, columns = shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
