"""The standard work of a case: build, forward, loss, backward, update, and record all of it.

Tensors are recorded in execution order: initial parameters, output, buffers, loss, gradients (those
of the last parameters first, as backward computes them; the input's last), the gradient norm if it
is clipped, updated parameters, buffers again, optimizer state. A fault shows first in the first
tensor that differs.

In plain torch the first update is made three times: with its gradients, and with gradients that are
off by their rounding, upwards and downwards. Optimizers of their own make the two extra updates on
copies of the weights. They show how far rounding alone may put each weight.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from shardproof.checked_objects import checked_optimizer
from shardproof.errors import NumericsError, UsageError
from shardproof.optim.state import state_layout
from shardproof.prover.case import CaseRun, parameter_layouts
from shardproof.prover.compare import OptimizerStep, spread
from shardproof.wording import dtype_name, short_repr

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

INITIAL = " (initial)"
UPDATE_GRADIENT = " (gradient of the update)"


@dataclass(frozen=True)
class Batch:
    """The data of one step, which the memory audit leaves out.

    Attributes:
        inputs: each (*), Replicate: the arguments of the model.
        target: (*), Replicate.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor


def _examine_nothing(run: CaseRun, output: Tensor) -> None:
    """No claims beyond equal bits and agreement."""


@dataclass(frozen=True)
class Training:
    """A case's work: trains a model for some steps.

    Attributes:
        build: makes the model; a plain torch module where `run.axis` is None.
        batch: makes the batch, the same on every rank and at every step.
        loss: computes it from run, output and target.
        optimizer: makes one for some parameters; None makes no update.
        steps: how many. Agreement with plain torch is judged on the first only.
        wants_input_grads: whether gradients of floating-point inputs are computed and recorded.
        clip: clips the gradients of a run's model in place and returns their norm; or None.
        measures_creation: whether the memory audit covers `build`.
        examine: called with run and output after the first backward, to claim what the case shows.
    """

    build: Callable[[CaseRun], nn.Module]
    batch: Callable[[CaseRun], Batch]
    loss: Callable[[CaseRun, Tensor, Tensor], Tensor]
    optimizer: MakeOptimizer | None = None
    steps: int = 1
    wants_input_grads: bool = True
    clip: Callable[[CaseRun, nn.Module], Tensor] | None = None
    measures_creation: bool = True
    examine: Callable[[CaseRun, Tensor], None] = _examine_nothing

    def __call__(self, run: CaseRun) -> None:
        """Run on one rank, or in plain torch."""
        batch = self._data(run)
        model = self._build(run)
        with run.measured():
            optimizer = make_optimizer(self.optimizer, model) if self.optimizer else None
        record_parameters(run, model, suffix=INITIAL)
        masks = infinite_buffers(model)
        for step in run.steps(model, optimizer, 1 if run.is_reference else self.steps):
            prefix, is_first = f"step {step + 1}: " if step else "", not step
            output, loss = self._forward(run, model, batch)
            run.record(f"{prefix}output", output, judged=is_first)
            after = " (after forward)"
            record_buffers(run, model, prefix=prefix, suffix=after, judged=is_first, masks=masks)
            run.record(f"{prefix}loss", loss, judged=is_first)
            run.follow(loss)
            with run.measured():
                loss.backward()
            record_gradients(run, model, batch.inputs, prefix=prefix, judged=is_first)
            if is_first:
                self.examine(run, output.detach())
            self._update(run, model, optimizer, prefix=prefix, judged=is_first)
            if optimizer is not None:
                record_buffers(run, model, prefix=prefix, judged=is_first, masks=masks)
                record_state(run, model, optimizer, prefix=prefix, judged=is_first)
            model.zero_grad(set_to_none=True)
            for x in batch.inputs:
                x.grad = None

    def _data(self, run: CaseRun) -> Batch:
        batch = self.batch(run)
        inputs = tuple(run.data(x.detach().clone()) for x in batch.inputs)
        for x in inputs:
            if self.wants_input_grads and x.is_floating_point():
                x.requires_grad_()
                # Its gradient has its size and is no data: with it, x is an activation.
                run.activation_bytes = max(run.activation_bytes, x.numel() * x.element_size())
        # A copy each, or ranks as threads would share what a loss writes into its target.
        return Batch(inputs, run.data(batch.target.detach().clone()))

    def _build(self, run: CaseRun) -> nn.Module:
        if not self.measures_creation:
            return run.adopt(run.cast(self.build(run)))
        with run.measured():
            return run.adopt(run.cast(self.build(run)))

    def _forward(self, run: CaseRun, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with run.measured():
            output = model(*batch.inputs)
            if not isinstance(output, Tensor):
                raise UsageError(
                    f"{type(model).__name__} returns a {type(output).__name__}, and a proof needs "
                    f"one tensor. Wrap it in a module that returns the tensor to compare."
                )
            return output, _checked_loss(self.loss(run, output, batch.target))

    def _update(
        self,
        run: CaseRun,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        prefix: str,
        judged: bool,
    ) -> None:
        if self.clip is not None:
            with run.measured():
                norm = self.clip(run, model)
            run.record(f"{prefix}grad_norm", norm, judged=judged)
        if optimizer is None or self.optimizer is None:
            return
        update = Update(run, model, self.optimizer, judged=judged)
        with run.measured():
            optimizer.step()
        update.record(prefix=prefix)


def _checked_loss(loss: object) -> Tensor:
    """What a loss function returned, if backward can start from it.

    Raises:
        UsageError: it is no tensor of one number, or does not depend on a parameter.
    """
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"the loss is {short_repr(loss)}, not a tensor. Return what a loss of torch gives, "
            "such as torch.nn.functional.mse_loss(output, target)."
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
    run: CaseRun, model: nn.Module, *, prefix: str = "", suffix: str = "", judged: bool = True
) -> None:
    """Record every parameter, first to last."""
    layouts = parameter_layouts(model)
    for name, parameter in model.named_parameters():
        run.record(f"{prefix}{name}{suffix}", parameter, layouts[name], judged=judged)


def infinite_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> a copy of every buffer that has infinities and no NaN, as a mask of attention has."""
    return {
        name: buffer.detach().clone()
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.isinf().any() and not buffer.isnan().any()
    }


def record_buffers(
    run: CaseRun,
    model: nn.Module,
    *,
    prefix: str = "",
    suffix: str = "",
    judged: bool = True,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Record every buffer of real or whole numbers as replicated, persistent or not.

    Args:
        run: of the case.
        model: with the buffers.
        prefix: before their names.
        suffix: after them.
        judged: whether they must agree with plain torch.
        masks: buffers that had infinities at the start. They are no fault while unchanged.
    """
    for name, buffer in model.named_buffers():
        if not buffer.is_complex() and buffer.dtype != torch.bool:
            mask = (masks or {}).get(name)
            is_mask = mask is not None and torch.equal(mask, buffer)
            run.record(f"{prefix}{name}{suffix}", buffer, judged=judged, may_be_infinite=is_mask)


def record_gradients(
    run: CaseRun,
    model: nn.Module,
    inputs: tuple[Tensor, ...] = (),
    *,
    prefix: str = "",
    judged: bool = True,
) -> None:
    """Record every gradient in the order in which backward computes them."""
    layouts = parameter_layouts(model)
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None:
            run.record(f"{prefix}{name}.grad", parameter.grad, layouts[name], judged=judged)
    for place, x in enumerate(inputs):
        if x.grad is not None:
            name = "input.grad" if len(inputs) == 1 else f"input {place}.grad"
            run.record(f"{prefix}{name}", x.grad, judged=judged)


def record_state(
    run: CaseRun, model: nn.Module, optimizer: Optimizer, *, prefix: str = "", judged: bool = True
) -> None:
    """Record the optimizer's state, each tensor with its own layout."""
    layouts = parameter_layouts(model)
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, torch.Tensor):
                layout = state_layout(optimizer, key, value, layouts[name])
                run.record(f"{prefix}{name}.{key}", value, layout, judged=judged)


def make_optimizer(make: MakeOptimizer, model: nn.Module) -> Optimizer:
    """An optimizer whose bits do not depend on how its parameters are cut.

    Raises:
        NumericsError: it is a fused one.
    """
    optimizer = checked_optimizer(
        make(model.parameters()), what="what the function optimizer returned"
    )
    if any(group.get("fused") for group in optimizer.param_groups):
        raise NumericsError(
            f"{type(optimizer).__name__}(fused=True) gives other bits when a parameter is cut. "
            f"Use fused=False (the for-loop and foreach forms do not)."
        )
    return optimizer


class Update:
    """Records one update of a model's weights; make it before `optimizer.step()`.

    Args:
        run: of the case.
        model: with the gradients of the step.
        make: makes an optimizer for some parameters.
        judged: whether the weights must agree with plain torch.
    """

    def __init__(
        self, run: CaseRun, model: nn.Module, make: MakeOptimizer, *, judged: bool = True
    ) -> None:
        self._run, self._model, self._judged = run, model, judged
        self._has_gradient: dict[str, bool] = {}
        self._shifted_updates: list[dict[str, Tensor]] = []
        if judged:
            with run.audit.paused(), torch.no_grad():
                self._read_gradients(make)

    def record(self, *, prefix: str = "") -> None:
        """Record every weight, first to last; call it after the step."""
        layouts = parameter_layouts(self._model)
        for name, parameter in self._model.named_parameters():
            self._run.record(
                f"{prefix}{name}",
                parameter,
                layouts[name],
                judged=self._judged,
                step=self._step(name, parameter.detach()),
            )

    def _step(self, name: str, after: Tensor) -> OptimizerStep | None:
        if name not in self._has_gradient:
            return None
        before, has_gradient = f"{name}{INITIAL}", self._has_gradient[name]
        if not self._shifted_updates:
            return OptimizerStep(before, has_gradient)
        least = most = after
        for updated in self._shifted_updates:
            # A bound that is not finite would allow any value.
            end = torch.where(updated[name].isfinite(), updated[name], after)
            least, most = torch.minimum(least, end), torch.maximum(most, end)
        return OptimizerStep(before, has_gradient, least, most)

    def _read_gradients(self, make: MakeOptimizer) -> None:
        """Note which weights have a gradient; in plain torch also update copies off by rounding."""
        gradients = {
            name: parameter.grad
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None and not parameter.grad.is_sparse
        }
        self._has_gradient = {name: bool(grad.any()) for name, grad in gradients.items()}
        if self._run.is_precise:
            for name, grad in gradients.items():
                self._run.set_aside(f"{name}{UPDATE_GRADIENT}", grad)
        read = self._run.precise_gradient
        if read is None:
            return
        largest = max(
            (grad.abs().max().item() for grad in gradients.values() if grad.numel()), default=0.0
        )
        spreads = {}
        for name, grad in gradients.items():
            precise = read(name, tuple(grad.shape))
            if precise is None:
                return
            spreads[name] = spread(grad, precise.to(grad.device), largest).to(grad.dtype)
        for sign in (1, -1):
            shifted = {name: grad + sign * spreads[name] for name, grad in gradients.items()}
            self._shifted_updates.append(_updated_copies(self._model, shifted, make))


def _updated_copies(
    model: nn.Module, gradients: dict[str, Tensor], make: MakeOptimizer
) -> dict[str, Tensor]:
    """Name -> what a new optimizer makes of a copy of the weight with these gradients."""
    copies: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        copies[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        copies[name].grad = gradients.get(name)
    make(list(copies.values())).step()
    return {name: copies[name].detach() for name in gradients}


class KeepDouble(TorchFunctionMode):
    """A context in which no fp64 tensor is cast to fp32 by `x.float()`, `x.to(...)` or `dtype=...`.

    Models of transformers compute norms, rotary angles and the loss in fp32 whatever they are
    given. In an fp64 run that would round to 6e-8, differently in every implementation. The model
    itself is not changed, and other threads are not affected.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(map(_widened, args))
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
