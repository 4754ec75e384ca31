"""A language model trained on real text for some steps of clipped AdamW, and all of it recorded.

Three runs. The first, without dropout, is compared with plain torch at its first step. The second
is one forward and backward in fp64, where ours must agree with plain torch to 1e-10. The third has
dropout on; plain torch draws other noise, so only the bits at the degrees are compared.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof import optim
from shardproof.cases.text import Text, standard_library
from shardproof.leaves import Layout
from shardproof.prover.case import Trial
from shardproof.prover.training import record_gradients, record_parameters, record_state
from shardproof.prover.update import INITIAL, Update, make_optimizer
from shardproof.prover.wide import KeepDouble

MAIN, PRECISE, DROPOUT = "", "fp64", "dropout"  # the runs, as records are prefixed
FEW = 4  # steps


@dataclass(frozen=True)
class Scores:
    """What a model says of some text.

    Attributes:
        logits: (B, T, vocabulary), as `layout` says.
        layout: how they lie on this rank.
        loss: (), Replicate; mean cross-entropy of each next token.
    """

    logits: Tensor
    layout: Layout
    loss: Tensor


class Pupil(Protocol):
    """A causal language model, cut or plain."""

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""

    def build(self, trial: Trial, *, dropout: float) -> nn.Module:
        """The model in training mode: plain torch where `trial.axis` is None, same numbers."""

    def score(self, trial: Trial, model: nn.Module, tokens: Tensor) -> Scores:
        """Logits and loss of tokens (B, T), Replicate."""

    def predict(self, trial: Trial, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
        """Logits alone, and how they lie."""


@dataclass(frozen=True)
class Lesson:
    """A function of a trial: what the module says.

    Attributes:
        pupil: the model.
        steps: how many; agreement with plain torch is judged on the first alone.
        rows, length: of the batch.
        learning_rate: of AdamW.
        max_norm: to which gradients are clipped.
        dropout: of the third run; 0 leaves it out.
        falls_to: the mean loss of the last two steps is at most this share of the first; of few
            steps any fall will do.
        rereads: every step reads the same text; by default each reads other text.
    """

    pupil: Pupil
    steps: int = 6
    rows: int = 4
    length: int = 32
    learning_rate: float = 5e-3
    max_norm: float = 1.0
    dropout: float = 0.1
    falls_to: float = 0.9
    rereads: bool = False

    def __call__(self, trial: Trial) -> None:
        """Run on one rank, or in plain torch."""
        text = standard_library()
        trial.check("text", len(text.content) > 0, str(text))
        self._train(trial, text, run=MAIN, dropout=0.0)
        self._compare_in_fp64(trial, text)
        if self.dropout and not trial.is_reference:
            self._train(trial, text, run=DROPOUT, dropout=self.dropout)

    def _train(self, trial: Trial, text: Text, *, run: str, dropout: float) -> None:
        """Train for all steps, or for the first in plain torch."""
        first = _Moment(run, 0)
        with _measured(trial, first.is_compared):
            model = trial.cast(self.pupil.build(trial, dropout=dropout))
            if first.is_compared:
                trial.adopt(model)
            optimizer = make_optimizer(self.adamw, model)
        if first.is_compared:
            record_parameters(trial, model, suffix=INITIAL)
            self._predict(trial, model, self._tokens(trial, text, 0))
        for step in range(1 if trial.is_reference else self.steps):
            now, tokens = _Moment(run, step), self._tokens(trial, text, step)
            self._step(trial, model, optimizer, tokens, now)
            if step in (0, self.steps - 1):
                record_state(trial, model, optimizer, prefix=now.prefix, judged=now.is_compared)
        if not trial.is_reference:
            _claim_fall(trial, run, self.falls_to if self.steps > FEW else 1.0)

    def _step(
        self,
        trial: Trial,
        model: nn.Module,
        optimizer: Optimizer,
        tokens: Tensor,
        now: "_Moment",
    ) -> None:
        """Forward, backward, clip and update, each recorded."""
        prefix, judged = now.prefix, now.is_compared
        with _measured(trial, judged), _kept_double(trial.is_precise):
            scores = self.pupil.score(trial, model, tokens)
        _record_scores(trial, scores, prefix=prefix, judged=judged)
        trial.follow(scores.loss, run=now.run)
        optimizer.zero_grad(set_to_none=True)
        with _measured(trial, judged):
            scores.loss.backward()
        record_gradients(trial, model, prefix=prefix, judged=judged)
        with _measured(trial, judged):
            norm = clip(trial, model, self.max_norm)
        trial.record(f"{prefix}grad_norm", norm, judged=judged)
        update = Update(trial, model, self.adamw, judged=judged)
        with _measured(trial, judged):
            optimizer.step()
        update.record(prefix=prefix)

    def _compare_in_fp64(self, trial: Trial, text: Text) -> None:
        """One forward and backward, judged as closely as fp64 allows."""
        model = trial.cast(self.pupil.build(trial, dropout=0.0)).double()
        tokens = self._tokens(trial, text, 0)
        with _kept_double(True):
            scores = self.pupil.score(trial, model, tokens)
        scores.loss.backward()
        _record_scores(trial, scores, prefix=f"{PRECISE}: ", judged=True)
        record_gradients(trial, model, prefix=f"{PRECISE}: ")

    @torch.no_grad()
    def _predict(self, trial: Trial, model: nn.Module, tokens: Tensor) -> None:
        """Logits in evaluation mode, before anything is learned."""
        model.eval()
        with trial.measured(), _kept_double(trial.is_precise):
            logits, layout = self.pupil.predict(trial, model, tokens)
        trial.record("eval: logits", logits, layout)
        model.train()

    def _tokens(self, trial: Trial, text: Text, step: int) -> Tensor:
        step = 0 if self.rereads else step
        return trial.data(
            text.windows(
                seed=trial.seed,
                step=step,
                rows=self.rows,
                length=self.length,
                vocabulary=self.pupil.vocabulary,
            )
        )

    def adamw(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """AdamW as Llama was trained with it.

        Its eps keeps rounding small where a gradient is nearly zero: with 1e-8 the update of such
        an element is the learning rate times noise, in plain torch as in ours.
        """
        return torch.optim.AdamW(
            parameters, lr=self.learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1
        )


@dataclass(frozen=True)
class _Moment:
    """Which step of which run, counted from 0."""

    run: str
    step: int

    @property
    def prefix(self) -> str:
        """Before the names of what is recorded."""
        if self.is_compared:
            return ""
        run = f"{self.run}: " if self.run else ""
        return f"{run}step {self.step + 1}: "

    @property
    def is_compared(self) -> bool:
        """Compared with plain torch, and seen by the memory audit; what follows does the same."""
        return self.run == MAIN and not self.step


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a plain model the numbers of one that is cut for a single rank, which holds all."""
    held = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(held[name])


def _measured(trial: Trial, is_wanted: bool) -> AbstractContextManager[object]:
    """The memory audit's bound is that of fp32 without dropout, whose masks it does not know."""
    return trial.measured() if is_wanted else nullcontext()


def _kept_double(is_precise: bool) -> AbstractContextManager[object]:
    return KeepDouble() if is_precise else nullcontext()


def _record_scores(trial: Trial, scores: Scores, *, prefix: str, judged: bool) -> None:
    trial.record(f"{prefix}logits", scores.logits, scores.layout, judged=judged)
    trial.record(f"{prefix}loss", scores.loss, judged=judged)


def clip(trial: Trial, model: nn.Module, max_norm: float) -> Tensor:
    """Clip gradients by their global norm, ours or plain torch's; returns the norm."""
    if trial.is_reference:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return optim.clip_grad_norm_(model, max_norm)


def _claim_fall(trial: Trial, run: str, falls_to: float) -> None:
    """Claim that something was learned; with one step there is nothing to see."""
    losses = trial.curves[run]
    if len(losses) < 2:
        return
    first, last = losses[0], sum(losses[-2:]) / 2 if len(losses) > 2 else losses[-1]
    which = " (mean of the last two)" if len(losses) > 2 else ""
    trial.check(
        f"loss falls{f' with {run}' if run else ''}",
        last <= falls_to * first,
        f"from {first:.4f} to {last:.4f}{which} over {len(losses)} steps",
    )
