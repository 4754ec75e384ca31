"""`WholeOptimizer`: base of optimizers whose update of an element depends on the whole matrix.

They look up the layout of each parameter (`layers.registry`), update this rank's part, and add over
the ranks by the canonical tree. Replicated parameters are updated alike on every rank. For narrower
dtypes the arithmetic is in fp32 and is rounded once, at the end.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardproof.errors import UsageError
from shardproof.layers import registry
from shardproof.leaves import Layout, replicated
from shardproof.optim.layouts import ParameterLayout


class WholeOptimizer(Optimizer):
    """Base of `Adafactor` and `Muon`."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient; all ranks call it.

        Args:
            closure: computes the loss and the gradients again; it is called first.

        Returns:
            The result of `closure`.

        Raises:
            UsageError: a parameter cannot be updated; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        local_grads = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        places = [self._place(parameter) for parameter, _ in local_grads]
        for (parameter, group), place in zip(local_grads, places, strict=True):
            self._update(parameter, group, place)
        return loss

    @abstractmethod
    def _update(self, parameter: Tensor, group: dict[str, Any], place: ParameterLayout) -> None:
        """Update one parameter; all ranks update the same parameter at the same time."""

    @abstractmethod
    def state_layouts(self, layout: Layout) -> dict[str, Layout]:
        """The layouts of the state of a parameter: key -> layout.

        Args:
            layout: layout of the parameter.
        """

    def _place(self, parameter: Tensor) -> ParameterLayout:
        """The layout of a parameter.

        Raises:
            UsageError: it cannot be updated by this optimizer; all ranks raise.
        """
        name = type(self).__name__
        part = registry.part_of(parameter)
        who = f"of shape {tuple(parameter.shape)}" if part is None else repr(part.name)
        grad = parameter.grad
        if parameter.is_complex() or not parameter.is_floating_point():
            raise UsageError(
                f"{name} got a parameter {who} of {parameter.dtype}, and updates real numbers. "
                "Give it to another optimizer."
            )
        if grad is not None and grad.layout is not torch.strided:
            raise UsageError(
                f"{name} got a sparse gradient of the parameter {who}. Make it dense "
                "(sparse=False in the embedding)."
            )
        for tensor in (parameter, parameter.data, grad):
            if tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
                raise UsageError(
                    f"{name} got a parameter {who} that is a {type(tensor).__name__}, of which it "
                    "would see a part. Use it before fully_shard, or another optimizer."
                )
        if part is None:
            return ParameterLayout(replicated(tuple(parameter.shape)), name=name)
        if part.layout is None:
            raise UsageError(
                f"{name} got {who}, from which a parametrization computes a part of a cut "
                "parameter: nothing says how it is cut. Remove the parametrization, or leave this "
                "layer out of the plan."
            )
        return ParameterLayout(part.layout, part.axis, f"{part.name} ({name})")


def write(target: Tensor, value: Tensor) -> None:
    """Round `value` into `target`, unless it is that tensor already."""
    if value is not target:
        target.copy_(value)


def scalar(value: float | Tensor) -> float:
    """A hyperparameter as a number; a tensor keeps its precision."""
    return value.item() if isinstance(value, Tensor) else float(value)


def check_scalar(name: str, value: float | Tensor, *, least: float = 0.0) -> None:
    """Raise unless a hyperparameter is one number of at least `least`.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise UsageError(f"{name} has {value.numel()} elements. Give one number.")
    if not scalar(value) >= least:
        raise UsageError(f"{name}={scalar(value)} is not at least {least:g}. Give a larger one.")
