"""The first training step of a case, without its proof."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shardproof.axis import Axis
from shardproof.leaves import Layout
from shardproof.prover.case import Case, CaseRun, RecordOptions
from shardproof.scheme import Scheme
from shardproof.showing.run import Window, Work


class _StepDoneError(Exception):
    """The first update is made; what a case does after it is not wanted."""


class _Recorder:
    """Keeps nothing, and ends the trial at the first updated weight."""

    def __init__(self) -> None:
        self.has_begun = False

    def record(self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions) -> None:
        """A case records its first weights before its step, and updated ones after it."""
        self.has_begun = True
        if how.step is not None:
            raise _StepDoneError

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Nothing is set aside on a rank."""


class _StepTrial(CaseRun):
    """A trial of which the phases of the first training step are windows of a trace."""

    def __init__(self, *, axis: Axis, scheme: Scheme, seed: int, window: Window) -> None:
        self._step_recorder, self._window = _Recorder(), window
        super().__init__(axis=axis, scheme=scheme, seed=seed, recorder=self._step_recorder)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Creation comes before anything is recorded; evaluation has no gradients."""
        if not self._step_recorder.has_begun or not torch.is_grad_enabled():
            yield
            return
        with self._window():
            yield


def case_work(case: Case, *, scheme: Scheme, seed: int) -> Work:
    """What every rank is to run to show the first step of a case.

    Args:
        case: which is installed.
        scheme: leaves and numerics.
        seed: of everything that the case draws.
    """

    def work(axis: Axis, window: Window) -> None:
        trial = _StepTrial(axis=axis, scheme=scheme, seed=seed, window=window)
        try:
            case.work(trial)
        except _StepDoneError:
            return

    return work
