"""One update of a model, recorded: each weight, and in plain torch how far rounding may put it.

Plain torch's optimizer is stepped three times at the first step: with its gradients, and with
gradients that are off by their rounding, upwards and downwards. The two extra steps are taken by
optimizers of their own on copies of the weights.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.errors import NumericsError
from shardproof.leaves import replicated
from shardproof.objects import checked_optimizer
from shardproof.prover.case import Trial, parameter_layouts
from shardproof.prover.rounding import Step, spread

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

INITIAL = " (initial)"
_GRADIENT = " (gradient of the update)"


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
    """The update of a model's weights at one step, to be made before `optimizer.step()`.

    Args:
        trial: the run.
        model: with the gradients of the step.
        make: makes an optimizer for some parameters.
        judged: whether the weights must agree with plain torch.
    """

    def __init__(
        self, trial: Trial, model: nn.Module, make: MakeOptimizer, *, judged: bool = True
    ) -> None:
        self._trial, self._model, self._judged = trial, model, judged
        self._has_gradient: dict[str, bool] = {}
        self._ends: list[dict[str, Tensor]] = []
        if judged:
            with trial.audit.paused(), torch.no_grad():
                self._look(make)

    def record(self, *, prefix: str = "") -> None:
        """Record every weight, first to last; after the step."""
        layouts = parameter_layouts(self._model)
        for name, parameter in self._model.named_parameters():
            self._trial.record(
                f"{prefix}{name}",
                parameter,
                layouts[name],
                judged=self._judged,
                step=self._step(name, parameter.detach()),
            )

    def _step(self, name: str, after: Tensor) -> Step | None:
        if name not in self._has_gradient:
            return None
        step = Step(f"{name}{INITIAL}", self._has_gradient[name])
        if not self._ends:
            return step
        least = most = after
        for stepped in self._ends:
            # What is not finite would allow anything.
            end = torch.where(stepped[name].isfinite(), stepped[name], after)
            least, most = torch.minimum(least, end), torch.maximum(most, end)
        return Step(step.before, step.has_gradient, least, most)

    def _look(self, make: MakeOptimizer) -> None:
        """See what the step begins with; in plain torch, step copies off by rounding."""
        gradients = {
            name: parameter.grad
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None and not parameter.grad.is_sparse
        }
        self._has_gradient = {name: bool(grad.any()) for name, grad in gradients.items()}
        if self._trial.is_precise:
            for name, grad in gradients.items():
                self._trial.set_aside(f"{name}{_GRADIENT}", grad)
        precise = self._trial.precise
        if precise is None or not all(precise.has_aside(f"{n}{_GRADIENT}") for n in gradients):
            return
        largest = max((_largest(grad) for grad in gradients.values()), default=0.0)
        spreads = {}
        for name, grad in gradients.items():
            true = precise.read(f"{name}{_GRADIENT}", replicated(tuple(grad.shape)))
            spreads[name] = spread(grad, true.to(grad.device), largest).to(grad.dtype)
        for sign in (1, -1):
            moved = {name: grad + sign * spreads[name] for name, grad in gradients.items()}
            self._ends.append(_stepped(self._model, moved, make))


def _stepped(
    model: nn.Module, gradients: dict[str, Tensor], make: MakeOptimizer
) -> dict[str, Tensor]:
    """Name -> what a new optimizer makes of copies of the weights with these gradients."""
    copies: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        copies[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        copies[name].grad = gradients.get(name)
    make(list(copies.values())).step()
    return {name: copies[name].detach() for name in gradients}


def _largest(grad: Tensor) -> float:
    return grad.abs().max().item() if grad.numel() else 0.0
