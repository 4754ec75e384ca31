"""Runs a case: twice in plain torch, and on one rank of one degree. What comes back is small."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.leaves import Layout, replicated
from shardproof.numerics import mode
from shardproof.prover.case import Case, Check, Recording, Trial
from shardproof.prover.compare import Figures, measure
from shardproof.prover.hashing import hash_copies, hash_tensor, owned_part
from shardproof.prover.reference import (
    PLAIN,
    PRECISE,
    Reference,
    ReferenceReader,
    ReferenceWriter,
)
from shardproof.prover.rounding import Before, Step, StepFigures, measure_step
from shardproof.prover.values import Kept, whole
from shardproof.scheme import Scheme
from shardproof.wording import dtype_name

Counts = dict[str, dict[str, dict[str, int]]]  # direction -> collective -> figures


@dataclass(frozen=True)
class Recorded:
    """One tensor as one rank saw it.

    Attributes:
        name, shape, dtype: of the full tensor.
        is_replicated: every rank holds it whole, and must hold the same.
        sha256: of the full tensor; None on the ranks that only sent their shard.
        is_judged: it must agree with plain torch.
        figures: where the rank's part stands; None if not judged, unknown to plain torch, or the
            copy of a replicated tensor that rank 0 has too.
        misfit: how shape or dtype differ from plain torch's, in words; then there are no figures.
        copies: name -> SHA-256 of what this rank holds of a leaf or a shared unit, where another
            one may own it: they must hold the same.
        step: of an updated weight, where the rank's part stands; None for any other tensor.
        nonfinite: "ours", "torch" or "fp64" -> how many numbers of the rank's part are not finite
            there, if any.
        kept: the shape that this rank holds, and numbers, if they are wanted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_replicated: bool
    sha256: str | None
    is_judged: bool
    figures: Figures | None = None
    misfit: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)
    step: StepFigures | None = None
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    kept: Kept | None = None


@dataclass(frozen=True)
class RankResult:
    """What one rank brings home from one run of a case.

    Attributes:
        rank: who.
        recorded: in execution order.
        checks: the case's own claims.
        largest_bytes, largest_shape: of the largest storage the rank allocated.
        share_bytes: of the largest owned share of a weight.
        counts: what crossed the axis, the prover's own gathers left out.
        seconds: that the run took.
        scheme: of the layers that ran, or the proof's if none was cut.
        contract: what the bits depend on, of those layers, their dtypes and this rank's threads.
        curves: run -> the loss of each of its steps.
        num_cut_parameters: how many there are of which no rank owns all.
        has_cut_tensors: code of the model may meet cut tensors.
    """

    rank: int
    recorded: tuple[Recorded, ...]
    checks: tuple[Check, ...]
    largest_bytes: int
    largest_shape: tuple[int, ...]
    share_bytes: int
    counts: Counts
    seconds: float
    scheme: Scheme
    contract: str
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    num_cut_parameters: int = 0
    has_cut_tensors: bool = False


class _FileRecorder:
    """Leaves every tensor of a plain torch run in a file."""

    def __init__(self, writer: ReferenceWriter) -> None:
        self._writer = writer

    def record(self, name: str, tensor: Tensor, layout: Layout, how: Recording) -> None:
        self._writer.write(name, tensor)
        if how.step is not None and how.step.least is not None and how.step.most is not None:
            self._writer.set_aside(_least(name), how.step.least)
            self._writer.set_aside(_most(name), how.step.most)

    def set_aside(self, name: str, tensor: Tensor) -> None:
        self._writer.set_aside(name, tensor)


class _RankRecorder:
    """Hashes every tensor of a rank and compares the rank's part with the reference."""

    def __init__(self, axis: Axis, reference: Reference, *, few: int = 0) -> None:
        self._axis = axis
        self._few = few
        self._plain, self._precise = reference.plain(), reference.precise()
        self._known = frozenset(self._plain.names())
        self.recorded: list[Recorded] = []

    def record(self, name: str, tensor: Tensor, layout: Layout, how: Recording) -> None:
        self._check_shape(name, tensor, layout)
        is_compared = how.judged and name in self._known
        misfit = self._plain.misfit(name, layout, tensor.dtype) if is_compared else ""
        self.recorded.append(
            Recorded(
                name,
                layout.shape,
                dtype_name(tensor.dtype),
                layout.is_replicated,
                hash_tensor(tensor, layout, self._axis, who=name),
                how.judged,
                misfit=misfit,
                copies=hash_copies(tensor, layout),
                kept=self._kept(name, tensor, layout, is_compared and not misfit),
                **self._measured(name, tensor, layout, how, is_compared and not misfit),
            )
        )

    def _kept(self, name: str, tensor: Tensor, layout: Layout, is_compared: bool) -> Kept | None:
        """Shape and numbers for those who want to look at them."""
        shape = tuple(tensor.shape)
        if not self._few or math.prod(layout.shape) > self._few:
            return Kept(shape) if self._few else None
        ours = whole(tensor, layout, self._axis, who=name)
        if self._axis.rank or not is_compared:
            return Kept(shape, None if self._axis.rank else ours)
        return Kept(shape, ours, self._plain.read(name, replicated(layout.shape)))

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Nothing: what is set aside is plain torch's."""

    def _check_shape(self, name: str, tensor: Tensor, layout: Layout) -> None:
        if tuple(tensor.shape) != layout.local_shape:
            raise ShapeError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} on {self._axis}, but its layout "
                f"gives this rank {layout.local_shape} of {layout.shape}. Hold what the layout "
                "says."
            )

    def _measured(
        self, name: str, tensor: Tensor, layout: Layout, how: Recording, is_compared: bool
    ) -> dict[str, Any]:
        """What of `Recorded` says where the numbers of this rank's part stand."""
        part, parts = owned_part(tensor, layout), {}
        parts["ours"] = part
        figures = step = None
        # The copy of a replicated tensor is compared once, on the first rank.
        if is_compared and not (layout.is_replicated and self._axis.rank):
            parts["torch"] = self._plain.read(name, layout)
            parts["fp64"] = self._precise.read(name, layout)
            figures = measure(part, parts["torch"], parts["fp64"])
            before = self._before(name, layout, how.step)
            if before is not None:
                step = measure_step(part, parts["torch"], parts["fp64"], before)
        counts = {where: _nonfinite(each, how.may_be_infinite) for where, each in parts.items()}
        nonfinite = {where: count for where, count in counts.items() if count}
        return {"figures": figures, "step": step, "nonfinite": nonfinite}

    def _before(self, name: str, layout: Layout, step: Step | None) -> Before | None:
        if step is None or not self._plain.has_aside(_least(name)):
            return None
        return Before(
            self._plain.read(step.before, layout),
            self._precise.read(step.before, layout),
            self._plain.read(_least(name), layout),
            self._plain.read(_most(name), layout),
            step.has_gradient,
        )


def _least(name: str) -> str:
    return f"{name} (least)"


def _most(name: str) -> str:
    return f"{name} (most)"


def _nonfinite(part: Tensor, may_be_infinite: bool) -> int:
    """How many numbers are NaN, or infinite where that is a fault."""
    if not (part.is_floating_point() or part.is_complex()):
        return 0
    return int((part.isnan() if may_be_infinite else ~part.isfinite()).sum().item())


def run_references(
    case: Case, *, scheme: Scheme | None, seed: int | None, directory: Path
) -> Reference:
    """Run a case in plain torch, in fp64 and as it is, and leave both in `directory`.

    fp64 comes first: the other run measures the rounding of its gradients by it.
    """
    precise = None
    for name in (PRECISE, PLAIN):
        writer = ReferenceWriter(directory / name)
        trial = Trial(
            axis=None,
            scheme=scheme,
            seed=seed,
            recorder=_FileRecorder(writer),
            is_precise=name == PRECISE,
            precise=precise,
        )
        case.work(trial)
        writer.activation_bytes = trial.activation_bytes
        writer.close()
        precise = ReferenceReader(directory / name)
    return Reference(directory)


def run_on_rank(
    axis: Axis,
    *,
    case: Case,
    scheme: Scheme | None,
    seed: int | None,
    reference: Reference,
    few: int = 0,
) -> RankResult:
    """Run a case on this rank; all ranks of `axis` call this.

    Args:
        axis: the ranks.
        case: what to run.
        scheme: leaves and numerics; None: those of the layers.
        seed: of everything the case draws.
        reference: what plain torch left.
        few: keep the numbers of tensors with at most so many; 0 keeps none.
    """
    _try_products(scheme)
    started = time.perf_counter()
    axis.transport.ledger.reset()
    recorder = _RankRecorder(axis, reference, few=few)
    trial = Trial(axis=axis, scheme=scheme, seed=seed, recorder=recorder)
    case.work(trial)
    return RankResult(
        axis.rank,
        tuple(recorder.recorded),
        tuple(trial.checks),
        trial.audit.largest_bytes,
        trial.audit.largest_shape,
        trial.share_bytes,
        _counts(axis.transport.ledger.as_dict()),
        time.perf_counter() - started,
        trial.scheme,
        trial.contract(),
        {run: tuple(losses) for run, losses in trial.curves.items()},
        trial.num_cut_parameters,
        trial.has_cut_tensors,
    )


def _try_products(scheme: Scheme | None) -> None:
    """Try what invariant layers try once per process: before the audit, not inside it."""
    if scheme is None:
        mode.self_check()  # the layers raise if theirs is invariant and this found a difference
    elif scheme.is_invariant:
        mode.require_invariant()
    if scheme is None or scheme.is_invariant:
        for dtype in (torch.float32, torch.float64):
            mode.addmm_limit(dtype)


def _counts(table: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Counts:
    """The ledger without the prover; forward and backward are always there."""
    shown: Counts = {"forward": {}, "backward": {}}
    for direction, kinds in table.items():
        if direction != "prover":
            shown[direction] = {kind: dict(figures) for kind, figures in kinds.items()}
    return shown
