"""The standard work of a case: build, forward, loss, backward, update, and record all of it.

Recorded in execution order: initial parameters, output, buffers, loss, gradients (those of the
last parameters first, as backward makes them; the input's last), the gradient norm if it is
clipped, updated parameters, buffers again, optimizer state. The first tensor that differs is then
where to look.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.errors import NumericsError, UsageError
from shardproof.optim.state import state_layout
from shardproof.prover.case import Trial, parameter_layouts

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Batch:
    """What one step learns from; data, which the memory audit leaves out.

    Attributes:
        inputs: each (*), Replicate: the arguments of the model.
        target: (*), Replicate.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor


def _examine_nothing(trial: Trial, output: Tensor) -> None:
    """No claims beyond equal bits and agreement."""


@dataclass(frozen=True)
class Training:
    """A function of a trial that trains a model for some steps.

    Attributes:
        build: makes the model: plain torch where `trial.axis` is None.
        batch: makes the batch, the same on every rank and at every step.
        loss: of trial, output and target.
        optimizer: makes one for some parameters; None: no update.
        steps: how many; agreement with plain torch is judged on the first alone.
        wants_input_grads: whether gradients of floating-point inputs are computed and recorded.
        clip: of trial and model: clips the gradients in place and returns their norm; or None.
        measures_creation: whether the memory audit covers `build`.
        examine: called with trial and output after the first step, for claims of the case's own.
    """

    build: Callable[[Trial], nn.Module]
    batch: Callable[[Trial], Batch]
    loss: Callable[[Trial, Tensor, Tensor], Tensor]
    optimizer: MakeOptimizer | None = None
    steps: int = 1
    wants_input_grads: bool = True
    clip: Callable[[Trial, nn.Module], Tensor] | None = None
    measures_creation: bool = True
    examine: Callable[[Trial, Tensor], None] = _examine_nothing

    def __call__(self, trial: Trial) -> None:
        """Run on one rank, or in plain torch."""
        batch = self._data(trial)
        model = self._build(trial)
        with trial.measured():
            optimizer = make_optimizer(self.optimizer, model) if self.optimizer else None
        record_parameters(trial, model, suffix=" (initial)")
        for step in range(1 if trial.is_reference else self.steps):
            prefix, is_first = f"step {step + 1}: " if step else "", not step
            output, loss = self._forward(trial, model, batch)
            trial.record(f"{prefix}output", output, judged=is_first)
            record_buffers(trial, model, prefix=prefix, suffix=" (after forward)", judged=is_first)
            trial.record(f"{prefix}loss", loss, judged=is_first)
            trial.follow(loss)
            with trial.measured():
                loss.backward()
            record_gradients(trial, model, batch.inputs, prefix=prefix, judged=is_first)
            if is_first:
                self.examine(trial, output.detach())
            self._update(trial, model, optimizer, prefix=prefix, judged=is_first)
            model.zero_grad(set_to_none=True)
            for x in batch.inputs:
                x.grad = None

    def _data(self, trial: Trial) -> Batch:
        batch = self.batch(trial)
        inputs = tuple(trial.data(x.detach().clone()) for x in batch.inputs)
        for x in inputs:
            if self.wants_input_grads and x.is_floating_point():
                x.requires_grad_()
                # Its gradient has its size and is no data: with it, x is an activation.
                trial.activation_bytes = max(trial.activation_bytes, x.numel() * x.element_size())
        # A copy each, or ranks as threads would share what a loss writes into its target.
        return Batch(inputs, trial.data(batch.target.detach().clone()))

    def _build(self, trial: Trial) -> nn.Module:
        if not self.measures_creation:
            return trial.adopt(trial.cast(self.build(trial)))
        with trial.measured():
            return trial.adopt(trial.cast(self.build(trial)))

    def _forward(self, trial: Trial, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with trial.measured():
            output = model(*batch.inputs)
            if not isinstance(output, Tensor):
                raise UsageError(
                    f"{type(model).__name__} returns a {type(output).__name__}, and a proof needs "
                    f"one tensor. Wrap it in a module that returns the tensor to compare."
                )
            return output, self.loss(trial, output, batch.target)

    def _update(
        self,
        trial: Trial,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        prefix: str,
        judged: bool,
    ) -> None:
        if self.clip is not None:
            with trial.measured():
                norm = self.clip(trial, model)
            trial.record(f"{prefix}grad_norm", norm, judged=judged)
        if optimizer is None:
            return
        with trial.measured():
            optimizer.step()
        record_parameters(trial, model, prefix=prefix, judged=judged)
        record_buffers(trial, model, prefix=prefix, judged=judged)
        record_state(trial, model, optimizer, prefix=prefix, judged=judged)


def make_optimizer(make: MakeOptimizer, model: nn.Module) -> Optimizer:
    """An optimizer whose bits do not depend on how its parameters are cut.

    Raises:
        NumericsError: it is a fused one.
    """
    optimizer = make(model.parameters())
    if any(group.get("fused") for group in optimizer.param_groups):
        raise NumericsError(
            f"{type(optimizer).__name__}(fused=True) gives other bits when a parameter is cut. "
            f"Use fused=False (the for-loop and foreach forms do not)."
        )
    return optimizer


def record_parameters(
    trial: Trial, model: nn.Module, *, prefix: str = "", suffix: str = "", judged: bool = True
) -> None:
    """Record every parameter, first to last."""
    layouts = parameter_layouts(model)
    for name, parameter in model.named_parameters():
        trial.record(f"{prefix}{name}{suffix}", parameter, layouts[name], judged=judged)


def record_buffers(
    trial: Trial, model: nn.Module, *, prefix: str = "", suffix: str = "", judged: bool = True
) -> None:
    """Record every buffer of real or whole numbers, saved with the state or not; replicated."""
    for name, buffer in model.named_buffers():
        if not buffer.is_complex() and buffer.dtype != torch.bool:
            trial.record(f"{prefix}{name}{suffix}", buffer, judged=judged)


def record_gradients(
    trial: Trial,
    model: nn.Module,
    inputs: tuple[Tensor, ...] = (),
    *,
    prefix: str = "",
    judged: bool = True,
) -> None:
    """Record every gradient in the order in which backward makes them."""
    layouts = parameter_layouts(model)
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None:
            trial.record(f"{prefix}{name}.grad", parameter.grad, layouts[name], judged=judged)
    for place, x in enumerate(inputs):
        if x.grad is not None:
            name = "input.grad" if len(inputs) == 1 else f"input {place}.grad"
            trial.record(f"{prefix}{name}", x.grad, judged=judged)


def record_state(
    trial: Trial, model: nn.Module, optimizer: Optimizer, *, prefix: str = "", judged: bool = True
) -> None:
    """Record the optimizer's state, as it lies."""
    layouts = parameter_layouts(model)
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, torch.Tensor):
                layout = state_layout(optimizer, key, value, layouts[name])
                trial.record(f"{prefix}{name}.{key}", value, layout, judged=judged)
