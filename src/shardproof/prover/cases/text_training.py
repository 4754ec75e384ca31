"""Trains a language model on real text for some steps of clipped AdamW, and records all of it.

A case trains three times. The first training, without dropout, is compared with plain torch at its
first step. The second is one forward and backward in fp64, in which ours must agree with plain
torch to 1e-10. The third has dropout; plain torch draws other noise, so only the bits at the
degrees are compared.

The text is on every machine: sources of Python's own standard library. A token is a byte, so
nothing is downloaded and no tokenizer is needed. The sources are those of the running interpreter,
so another version of Python gives another text, other losses and other hashes. The digest of the
text is in the report.
"""

import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof import optim
from shardproof.errors import UsageError
from shardproof.leaves import Layout
from shardproof.prover.case import CaseRun
from shardproof.prover.cases.drawn_layers import generator
from shardproof.prover.training import (
    INITIAL,
    KeepDouble,
    Update,
    make_optimizer,
    record_gradients,
    record_parameters,
    record_state,
)

BYTES = 256  # number of tokens in a text

# Plain modules that Python 3.11, 3.12 and 3.13 have under one name: half a megabyte of prose in
# docstrings and of code.
MODULES = (
    "argparse.py", "bisect.py", "calendar.py", "configparser.py", "copy.py", "csv.py",
    "difflib.py", "fractions.py", "functools.py", "heapq.py", "numbers.py", "random.py",
    "shlex.py", "statistics.py", "textwrap.py", "tokenize.py", "weakref.py",
)  # fmt: skip

MAIN, PRECISE, DROPOUT = "", "fp64", "dropout"  # the trainings; prefixes of their tensors
FEW = 4  # steps


@dataclass(frozen=True)
class SourceText:
    """A text as bytes.

    Attributes:
        content: (bytes,), uint8.
        digest: SHA-256 of them.
    """

    content: Tensor
    digest: str

    def __str__(self) -> str:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"{len(self.content):,} bytes of the Python {version} standard library, "
            f"sha256 {self.digest[:16]}"
        )

    def windows(
        self, *, seed: int, step: int, rows: int, length: int, vocabulary: int = BYTES
    ) -> Tensor:
        """Windows of the text as tokens, at places drawn from seed and step.

        Args:
            seed: random seed of the case.
            step: of the training; each step has other windows.
            rows: how many windows.
            length: tokens of each.
            vocabulary: number of tokens of the model.

        Returns:
            (rows, length), int64, Replicate.

        Raises:
            UsageError: the vocabulary has no token for every byte.
        """
        starts = torch.randint(
            len(self.content) - length + 1, (rows,), generator=generator(seed, f"text.step {step}")
        )
        places = starts[:, None] + torch.arange(length)
        return token_of_byte(vocabulary)[self.content[places].long()]


def token_of_byte(vocabulary: int) -> Tensor:
    """A token for every byte, (256,), spread over the whole vocabulary.

    Source code is ASCII, which uses only the lower half of the bytes. Unspread, they would all be
    rows of the embedding that the first ranks hold. So the bits of a byte are read backwards, and
    the tokens are spaced as far apart as the vocabulary allows.

    Raises:
        UsageError: the vocabulary has fewer tokens than there are bytes.
    """
    if vocabulary < BYTES:
        raise UsageError(
            f"the text has {BYTES} tokens, one for each byte, and the model knows {vocabulary}. "
            f"Use a model with at least {BYTES} tokens."
        )
    backwards = [int(f"{byte:08b}"[::-1], 2) for byte in range(BYTES)]
    return torch.tensor(backwards) * vocabulary // BYTES


def standard_library() -> SourceText:
    """The sources of this interpreter's own standard library."""
    return _read(Path(sysconfig.get_paths()["stdlib"]))


@functools.cache  # ranks that are threads share it; nothing writes into it
def _read(directory: Path) -> SourceText:
    return read(directory)


def read(directory: Path, modules: Iterable[str] = MODULES) -> SourceText:
    """The text of some files of a directory, sorted by name and joined.

    Args:
        directory: where they are.
        modules: their names, in any order.

    Raises:
        UsageError: one of them cannot be read.
    """
    joined = b"".join(_bytes_of(directory / name) for name in sorted(modules))
    content = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    return SourceText(content, hashlib.sha256(joined).hexdigest())


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the text to learn from is Python's own standard library, and {path} cannot be read: "
            f"{error.strerror}. Use an interpreter that has its sources, for instance one in a "
            f"virtual environment made by python -m venv."
        ) from None


@dataclass(frozen=True)
class LanguageModelOutput:
    """Logits and loss of a language model for some text.

    Attributes:
        logits: (B, T, vocabulary), as `layout` says.
        layout: of the logits on this rank.
        loss: (), Replicate; mean cross-entropy of each next token.
    """

    logits: Tensor
    layout: Layout
    loss: Tensor


class LanguageModelSource(Protocol):
    """Builds and runs a causal language model, cut or plain."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""

    def build(self, run: CaseRun, *, dropout: float) -> nn.Module:
        """The model in training mode, with the same numbers cut and in plain torch."""

    def score(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> LanguageModelOutput:
        """Logits and loss of tokens (B, T), Replicate."""

    def loss_sum(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> Tensor:
        """The loss of tokens (B, T), summed over all next tokens, (), Replicate."""

    def predict(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
        """Logits in evaluation mode, and their layout."""


@dataclass(frozen=True)
class TextTraining:
    """A case's work: the three trainings.

    Attributes:
        source: builds and runs the model.
        steps: how many. Agreement with plain torch is judged on the first only.
        rows, length: of the batch.
        learning_rate: of AdamW.
        max_norm: to which gradients are clipped.
        dropout: of the third training; 0 leaves that training out.
        falls_to: the mean loss of the last two steps must be at most this share of the first. With
            few steps any fall will do.
        rereads: every step reads the same text; by default each step reads another text.
    """

    source: LanguageModelSource
    steps: int = 6
    rows: int = 4
    length: int = 32
    learning_rate: float = 5e-3
    max_norm: float = 1.0
    dropout: float = 0.1
    falls_to: float = 0.9
    rereads: bool = False

    def __call__(self, run: CaseRun) -> None:
        """Run on one rank, or in plain torch."""
        text = standard_library()
        run.check("text", len(text.content) > 0, str(text))
        self._train(run, text, phase=MAIN, dropout=0.0)
        self._compare_in_fp64(run, text)
        if self.dropout and not run.is_reference:
            self._train(run, text, phase=DROPOUT, dropout=self.dropout)

    def _train(self, run: CaseRun, text: SourceText, *, phase: str, dropout: float) -> None:
        """Train for all steps; in plain torch only for the first."""
        first = _TrainingStep(phase, 0)
        with _measured(run, first.is_compared):
            model = run.cast(self.source.build(run, dropout=dropout))
            if first.is_compared:
                run.adopt(model)
            optimizer = make_optimizer(self.adamw, model)
        if first.is_compared:
            record_parameters(run, model, suffix=INITIAL)
            self._predict(run, model, self._tokens(run, text, 0))
        total = 1 if run.is_reference else self.steps
        for step in run.steps(model, optimizer, total, name=phase):
            now, tokens = _TrainingStep(phase, step), self._tokens(run, text, step)
            self._step(run, model, optimizer, tokens, now)
            if step in (0, self.steps - 1):
                record_state(run, model, optimizer, prefix=now.prefix, judged=now.is_compared)
        if not run.is_reference:
            _claim_fall(run, phase, self.falls_to if self.steps > FEW else 1.0)

    def _step(
        self,
        run: CaseRun,
        model: nn.Module,
        optimizer: Optimizer,
        tokens: Tensor,
        now: "_TrainingStep",
    ) -> None:
        """Forward, backward, clip and update, each recorded."""
        prefix, judged = now.prefix, now.is_compared
        with _measured(run, judged), kept_double(run.is_precise):
            output = self.source.score(run, model, tokens)
        _record_output(run, output, prefix=prefix, judged=judged)
        run.follow(output.loss, run=now.phase)
        optimizer.zero_grad(set_to_none=True)
        with _measured(run, judged):
            output.loss.backward()
        record_gradients(run, model, prefix=prefix, judged=judged)
        with _measured(run, judged):
            norm = clip(run, model, self.max_norm)
        run.record(f"{prefix}grad_norm", norm, judged=judged)
        update = Update(run, model, self.adamw, judged=judged)
        with _measured(run, judged):
            optimizer.step()
        update.record(prefix=prefix)

    def _compare_in_fp64(self, run: CaseRun, text: SourceText) -> None:
        """One forward and backward in fp64, judged by the tolerance of fp64."""
        model, tokens = self.source.build(run, dropout=0.0).double(), self._tokens(run, text, 0)
        with kept_double(True):
            output = self.source.score(run, model, tokens)
        output.loss.backward()
        _record_output(run, output, prefix=f"{PRECISE}: ", judged=True)
        record_gradients(run, model, prefix=f"{PRECISE}: ")

    @torch.no_grad()
    def _predict(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> None:
        """Logits in evaluation mode, before training."""
        model.eval()
        with run.measured(), kept_double(run.is_precise):
            logits, layout = self.source.predict(run, model, tokens)
        run.record("eval: logits", logits, layout)
        model.train()

    def _tokens(self, run: CaseRun, text: SourceText, step: int) -> Tensor:
        step = 0 if self.rereads else step
        return run.data(
            text.windows(
                seed=run.seed,
                step=step,
                rows=self.rows,
                length=self.length,
                vocabulary=self.source.vocabulary,
            )
        )

    def adamw(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """AdamW as Llama was trained with it.

        Its eps bounds the effect of rounding where a gradient is nearly zero: with 1e-8 the update
        of such an element is the learning rate times noise, in plain torch as in ours.
        """
        return torch.optim.AdamW(
            parameters, lr=self.learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1
        )


@dataclass(frozen=True)
class _TrainingStep:
    """Which step of which training, counted from 0."""

    phase: str
    step: int

    @property
    def prefix(self) -> str:
        """Prefix of the names of its tensors."""
        if self.is_compared:
            return ""
        phase = f"{self.phase}: " if self.phase else ""
        return f"{phase}step {self.step + 1}: "

    @property
    def is_compared(self) -> bool:
        """True for the step that is compared with plain torch and that the memory audit covers."""
        return self.phase == MAIN and not self.step


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of a model cut for a single rank, which holds all, to a plain one."""
    parameters = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(parameters[name])


def _measured(run: CaseRun, is_wanted: bool) -> AbstractContextManager[object]:
    """Count allocations, except where dropout masks or fp64 exceed the bound of the audit."""
    return run.measured() if is_wanted else nullcontext()


def kept_double(is_precise: bool) -> AbstractContextManager[object]:
    """A context in which fp64 is not cast to fp32, if that is wanted."""
    return KeepDouble() if is_precise else nullcontext()


def _record_output(run: CaseRun, output: LanguageModelOutput, *, prefix: str, judged: bool) -> None:
    run.record(f"{prefix}logits", output.logits, output.layout, judged=judged)
    run.record(f"{prefix}loss", output.loss, judged=judged)


def clip(run: CaseRun, model: nn.Module, max_norm: float) -> Tensor:
    """Clip gradients by their global norm, ours or plain torch's; returns the norm."""
    if run.is_reference:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return optim.clip_grad_norm_(model, max_norm)


def _claim_fall(run: CaseRun, phase: str, falls_to: float) -> None:
    """Claim that the loss falls, if there are two steps or more."""
    losses = run.curves[phase]
    if len(losses) < 2:
        return
    first, last = losses[0], sum(losses[-2:]) / 2 if len(losses) > 2 else losses[-1]
    which = " (mean of the last two)" if len(losses) > 2 else ""
    run.check(
        f"loss falls{f' with {phase}' if phase else ''}",
        last <= falls_to * first,
        f"from {first:.4f} to {last:.4f}{which} over {len(losses)} steps",
    )
