"""`Program`: the functions that a user gives to `check`, and how each of them is called."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardproof.errors import UsageError
from shardproof.wording import short_repr

LEARNING_RATE = 0.1  # of the optimizer, if the user gives none


@dataclass(frozen=True)
class Program:
    """A tensor-parallel program and the plain one that it must agree with.

    Attributes:
        parallel: of the process group; builds the program of this rank.
        reference: builds the plain module.
        batch: what both are called with, or a function that makes it: a dict gives keyword
            arguments, a tuple or list positional ones, everything else is one argument.
        loss: of the output, or of the output and the batch; a scalar. None: `output.loss`, or the
            mean of the squares of the output.
        parallel_loss: in place of `loss` on the ranks; may take the group as a third argument.
        optimizer: of a list of parameters. None: SGD.
        update: of the program, the optimizer and the group, after backward, in place of
            `optimizer.step()`.
        reference_update: of the plain module and its optimizer.
        steps: number of updates.
    """

    parallel: Callable[[Any], nn.Module]
    reference: Callable[[], nn.Module]
    batch: Any
    loss: Callable[..., Tensor] | None = None
    parallel_loss: Callable[..., Tensor] | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    update: Callable[..., Any] | None = None
    reference_update: Callable[..., Any] | None = None
    steps: int = 1

    def __post_init__(self) -> None:
        for name in ("parallel", "reference"):
            _require_function(name, getattr(self, name))
        for name in ("loss", "parallel_loss", "optimizer", "update", "reference_update"):
            if getattr(self, name) is not None:
                _require_function(name, getattr(self, name))

    def build(self, group: Any | None) -> nn.Module:
        """The program of this rank, or the plain module where there is no group."""
        name = "reference" if group is None else "parallel"
        module = self.reference() if group is None else self.parallel(group)
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"{name} returned {short_repr(module)}, and a torch.nn.Module is needed. Return "
                "the module that is called with the batch."
            )
        return module

    def make_batch(self, dtype: torch.dtype) -> Any:
        """The batch, with floating-point tensors in `dtype`."""
        batch = self.batch() if callable(self.batch) else self.batch
        return pytree.tree_map(
            lambda each: each.detach().clone().to(dtype) if is_floating(each) else each, batch
        )

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a module."""
        parameters = [each for each in module.parameters() if each.requires_grad]
        if self.optimizer is None:
            # The loop over parameters is what DTensor parameters of several meshes need.
            return torch.optim.SGD(parameters, lr=LEARNING_RATE, foreach=False)
        return self.optimizer(parameters)

    def loss_of(self, output: Any, batch: Any, group: Any | None) -> Tensor:
        """The loss of an output.

        Raises:
            UsageError: it is not a scalar.
        """
        loss_fn = self.loss
        if group is not None and self.parallel_loss is not None:
            loss_fn = self.parallel_loss
        if loss_fn is None:
            loss = _default_loss(output)
        else:
            loss = loss_fn(*(output, batch, group)[: _num_arguments(loss_fn, most=3)])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UsageError(
                f"the loss is {short_repr(loss)}, and a tensor of one element is needed. Return a "
                "sum or a mean."
            )
        return loss

    def step(self, module: nn.Module, optimizer: torch.optim.Optimizer, group: Any | None) -> None:
        """Update the parameters."""
        if group is None and self.reference_update is not None:
            self.reference_update(module, optimizer)
        elif group is not None and self.update is not None:
            self.update(*(module, optimizer, group)[: _num_arguments(self.update, most=3)])
        else:
            optimizer.step()


def call(module: nn.Module, batch: Any) -> Any:
    """The output of a module for a batch."""
    if isinstance(batch, dict):
        return module(**batch)
    if isinstance(batch, tuple | list):
        return module(*batch)
    return module(batch)


def is_floating(value: Any) -> bool:
    """Whether a value is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _require_function(name: str, value: Any) -> None:
    if not callable(value):
        raise UsageError(f"{name}={short_repr(value)} is not callable. Pass a function.")


def _num_arguments(function: Callable[..., Any], *, most: int) -> int:
    """How many positional arguments a function takes, at most `most`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function in C
        return 1
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return most
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.kind in kinds and each.default is each.empty]
    return min(max(len(needed), 1), most)


def _default_loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [each for each in pytree.tree_leaves(output) if is_floating(each)]
    if not tensors:
        raise UsageError(
            f"the output is {short_repr(output)}, which has no tensor of floating-point numbers "
            "to make a loss of. Pass loss=..., a function of the output."
        )
    return tensors[0].square().mean()
