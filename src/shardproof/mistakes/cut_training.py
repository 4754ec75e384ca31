"""The work of a set-up whose outputs may be cut: forward, loss, backward and update.

Like `prover.training`, for models that have no single whole output. The memory audit sees none of
it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardproof.leaves import Layout
from shardproof.prover.case import CaseRun
from shardproof.prover.training import (
    INITIAL,
    MakeOptimizer,
    Update,
    make_optimizer,
    record_gradients,
    record_parameters,
    record_state,
)


@dataclass(frozen=True)
class Scored:
    """The output and the loss of a model for its batch.

    Attributes:
        name: of the output.
        output: as `layout` says.
        layout: how it lies on this rank.
        loss: (), Replicate.
    """

    name: str
    output: Tensor
    layout: Layout
    loss: Tensor


def change_nothing(model: nn.Module) -> None:
    """Leave the gradients as they are."""


@dataclass(frozen=True)
class CutTraining:
    """A function of a run that trains a model.

    Attributes:
        build: makes the model: plain torch where `run.axis` is None.
        score: of run and model.
        optimizer: makes one for some parameters.
        count: how many steps; agreement with plain torch is judged on the first.
        after_backward: called with a rank's model once it has its gradients.
        draws_alike: plain torch draws what we draw; if not, nothing after the start is compared
            with it.
    """

    build: Callable[[CaseRun], nn.Module]
    score: Callable[[CaseRun, nn.Module], Scored]
    optimizer: MakeOptimizer
    count: int
    after_backward: Callable[[nn.Module], None] = change_nothing
    draws_alike: bool = True
    measures_creation = False

    def __call__(self, run: CaseRun) -> None:
        """Run on one rank, or in plain torch."""
        model = run.adopt(run.cast(self.build(run)).train())
        record_parameters(run, model, suffix=INITIAL)
        if run.is_reference and not self.draws_alike:
            return
        optimizer = make_optimizer(self.optimizer, model)
        for step in range(1 if run.is_reference else self.count):
            prefix = f"step {step + 1}: " if step else ""
            self._step(run, model, optimizer, prefix=prefix)

    def _step(
        self, run: CaseRun, model: nn.Module, optimizer: torch.optim.Optimizer, *, prefix: str
    ) -> None:
        judged = not prefix and self.draws_alike
        scores = self.score(run, model)
        run.record(f"{prefix}{scores.name}", scores.output, scores.layout, judged=judged)
        run.record(f"{prefix}loss", scores.loss, judged=judged)
        run.follow(scores.loss)
        scores.loss.backward()
        if run.axis is not None:
            self.after_backward(model)
        record_gradients(run, model, prefix=prefix, judged=judged)
        update = Update(run, model, self.optimizer, judged=judged)
        optimizer.step()
        update.record(prefix=prefix)
        record_state(run, model, optimizer, prefix=prefix, judged=judged)
        model.zero_grad(set_to_none=True)
