"""The standard work of a case: build, forward, loss, backward, update, and record all of it.

Recorded in execution order: initial parameters, output, buffers, loss, gradients (those of the
last parameters first, as backward makes them; the input's last), the gradient norm if it is
clipped, updated parameters, buffers again, optimizer state. The first tensor that differs is then
where to look.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.errors import UsageError
from shardproof.optim.state import state_layout
from shardproof.prover.case import Trial, parameter_layouts
from shardproof.prover.update import INITIAL, MakeOptimizer, Update, make_optimizer
from shardproof.wording import dtype_name, shown


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
        record_parameters(trial, model, suffix=INITIAL)
        masks = infinite_buffers(model)
        for step in range(1 if trial.is_reference else self.steps):
            prefix, is_first = f"step {step + 1}: " if step else "", not step
            output, loss = self._forward(trial, model, batch)
            trial.record(f"{prefix}output", output, judged=is_first)
            after = " (after forward)"
            record_buffers(trial, model, prefix=prefix, suffix=after, judged=is_first, masks=masks)
            trial.record(f"{prefix}loss", loss, judged=is_first)
            trial.follow(loss)
            with trial.measured():
                loss.backward()
            record_gradients(trial, model, batch.inputs, prefix=prefix, judged=is_first)
            if is_first:
                self.examine(trial, output.detach())
            self._update(trial, model, optimizer, prefix=prefix, judged=is_first)
            if optimizer is not None:
                record_buffers(trial, model, prefix=prefix, judged=is_first, masks=masks)
                record_state(trial, model, optimizer, prefix=prefix, judged=is_first)
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
            return output, _checked_loss(self.loss(trial, output, batch.target))

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
        if optimizer is None or self.optimizer is None:
            return
        update = Update(trial, model, self.optimizer, judged=judged)
        with trial.measured():
            optimizer.step()
        update.record(prefix=prefix)


def _checked_loss(loss: object) -> Tensor:
    """What a loss function returned, if something can be learned from it.

    Raises:
        UsageError: it is no tensor of one number, or does not depend on a parameter.
    """
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"the loss is {shown(loss)}, not a tensor. Return what a loss of torch gives, such as "
            "torch.nn.functional.mse_loss(output, target)."
        )
    if loss.numel() != 1 or not loss.is_floating_point():
        kind = dtype_name(loss.dtype)
        raise UsageError(
            f"the loss has shape {tuple(loss.shape)} and dtype {kind}, and a loss is one "
            "floating-point number. Take its mean() or its sum()."
        )
    if not loss.requires_grad:
        raise UsageError(
            "the loss has no gradient: no parameter took part in it, or it was detached. Compute "
            "it from the output without detach() and no_grad()."
        )
    return loss


def record_parameters(
    trial: Trial, model: nn.Module, *, prefix: str = "", suffix: str = "", judged: bool = True
) -> None:
    """Record every parameter, first to last."""
    layouts = parameter_layouts(model)
    for name, parameter in model.named_parameters():
        trial.record(f"{prefix}{name}{suffix}", parameter, layouts[name], judged=judged)


def infinite_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> a copy of every buffer that has infinities and no NaN, as a mask of attention has."""
    return {
        name: buffer.detach().clone()
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.isinf().any() and not buffer.isnan().any()
    }


def record_buffers(
    trial: Trial,
    model: nn.Module,
    *,
    prefix: str = "",
    suffix: str = "",
    judged: bool = True,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Record every buffer of real or whole numbers, saved with the state or not; replicated.

    Args:
        trial: the run.
        model: with the buffers.
        prefix: before their names.
        suffix: after them.
        judged: whether they must agree with plain torch.
        masks: those that had infinities at the start, which are no fault while nothing changes.
    """
    for name, buffer in model.named_buffers():
        if not buffer.is_complex() and buffer.dtype != torch.bool:
            mask = (masks or {}).get(name)
            is_mask = mask is not None and torch.equal(mask, buffer)
            trial.record(f"{prefix}{name}{suffix}", buffer, judged=judged, may_be_infinite=is_mask)


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
