"""Runs a case and records its tensors: in plain torch as files, on a rank as hashes and figures.

Plain torch runs a case twice before the ranks start: `PRECISE` in fp64, and `PLAIN` as the case is
written, from the same numbers. Both leave their tensors in files, of which a rank reads only its
own part. These two runs are exempt from the memory rule. What a rank returns is small.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.leaves import Layout, replicated
from shardproof.numerics import mode
from shardproof.prover.case import (
    Case,
    CaseRun,
    Check,
    PartOfTrainings,
    PreciseGradient,
    RecordOptions,
)
from shardproof.prover.compare import (
    Figures,
    OptimizerStep,
    StepFigures,
    StepReference,
    measure,
    measure_step,
)
from shardproof.prover.hashing import gather_whole, hash_copies, hash_tensor, owned_part
from shardproof.prover.training import UPDATE_GRADIENT
from shardproof.scheme import Scheme
from shardproof.wording import dtype_name

PLAIN, PRECISE = "plain", "fp64"
_MANIFEST = "manifest.json"
_INTEGERS = {torch.bfloat16: torch.int16}  # dtypes that numpy lacks travel as integers


class ReferenceWriter:
    """Writes the tensors of one run to a directory: one file of raw bytes each, and a list.

    The files are raw because ranks that are threads read them at the same time: numpy parses the
    header of an .npy file with `ast.literal_eval`, which sometimes fails when several threads of
    CPython 3.11 call it.

    Attributes:
        activation_bytes: of the largest activation of the run; set by the caller before `close`.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._entries: dict[str, dict[str, Any]] = {}
        self._aside: dict[str, dict[str, Any]] = {}
        self.activation_bytes = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep one tensor."""
        self._entries[name] = self._keep(tensor)

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor that no rank records, but that others are judged by."""
        self._aside[name] = self._keep(tensor)

    def _keep(self, tensor: Tensor) -> dict[str, Any]:
        file = f"{len(self._entries) + len(self._aside):04d}.bin"
        dtype = dtype_name(tensor.dtype)
        _as_numpy(tensor.detach().cpu().contiguous()).tofile(self._directory / file)
        return {"file": file, "dtype": dtype, "shape": list(tensor.shape)}

    def close(self) -> None:
        """Write the list of tensors."""
        manifest = {
            "activation_bytes": self.activation_bytes,
            "tensors": self._entries,
            "aside": self._aside,
        }
        (self._directory / _MANIFEST).write_text(json.dumps(manifest))


class ReferenceReader:
    """Reads the files of a `ReferenceWriter`; many ranks may read at once."""

    def __init__(self, directory: Path) -> None:
        manifest = json.loads((directory / _MANIFEST).read_text())
        self._directory = directory
        self._entries: dict[str, dict[str, Any]] = manifest["tensors"]
        self._aside: dict[str, dict[str, Any]] = manifest["aside"]
        self.activation_bytes: int = manifest["activation_bytes"]

    def names(self) -> tuple[str, ...]:
        """The recorded tensors, in execution order."""
        return tuple(self._entries)

    def gradient(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The gradient that a weight had before the update; None if none was set aside."""
        key = f"{name}{UPDATE_GRADIENT}"
        return self.read(key, replicated(shape)) if self.has_aside(key) else None

    def has_aside(self, name: str) -> bool:
        """True if a tensor of this name was set aside."""
        return name in self._aside

    def misfit(self, name: str, layout: Layout, dtype: torch.dtype) -> str:
        """How a tensor's shape or dtype differs from plain torch's; "" if neither does."""
        entry, ours = self._entries[name], dtype_name(dtype)
        shape = tuple(entry["shape"])
        if shape != layout.shape:
            hint = " (if it is sharded: gather it, or give its layout)"
            return (
                f"its shape is {layout.shape}, plain torch's {shape}"
                f"{hint if layout.is_replicated else ''}"
            )
        if entry["dtype"] != ours:
            return f"its dtype is {ours}, plain torch's {entry['dtype']}"
        return ""

    def read(self, name: str, layout: Layout) -> Tensor:
        """A copy of the part of one tensor that a rank owns; only that part is read from the file.

        Args:
            name: as it was written or set aside.
            layout: how the tensor lies on the rank.

        Raises:
            ShapeError: the tensor has another shape than the layout says.
        """
        entry = self._entries[name] if name in self._entries else self._aside[name]
        if tuple(entry["shape"]) != layout.shape:
            raise ShapeError(
                f"tensor {name!r} has shape {layout.shape} on the ranks together and "
                f"{tuple(entry['shape'])} in plain torch. Record both with the same global shape; "
                f"an output that is sharded needs a layout that says so, or gather_output=True."
            )
        dtype = getattr(torch, entry["dtype"])
        part = torch.empty(layout.owned_shape, dtype=dtype, device="cpu")
        if part.numel():
            target = _as_numpy(part)
            file = self._directory / entry["file"]
            mapped = np.memmap(file, target.dtype, mode="r", shape=layout.shape)
            if layout.dim is None:
                target[...] = mapped
                return part
            before, start = (slice(None),) * layout.dim, 0
            for run in layout.owned_runs:
                stop = start + len(run)
                target[(*before, slice(start, stop))] = mapped[
                    (*before, slice(run.start, run.stop))
                ]
                start = stop
        return part


def _as_numpy(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The same memory as a numpy array; dtypes that numpy lacks become integers."""
    return tensor.view(_INTEGERS.get(tensor.dtype, tensor.dtype)).numpy()


FEW = 100  # elements of the largest tensor whose values a report shows

Counts = dict[str, dict[str, dict[str, int]]]  # direction -> collective -> figures


@dataclass(frozen=True)
class TensorValues:
    """What one rank keeps of a tensor that the report is to show.

    Attributes:
        shape: of the part that this rank holds.
        ours: the whole tensor, on rank 0, if it is small enough.
        torch: plain torch's tensor, on rank 0; None if it has none.
    """

    shape: tuple[int, ...]
    ours: Tensor | None = None
    torch: Tensor | None = None


@dataclass(frozen=True)
class TensorRecord:
    """One tensor as one rank recorded it.

    Attributes:
        name, shape, dtype: of the full tensor.
        is_replicated: every rank holds it whole, and must hold the same.
        sha256: of the full tensor; None on the ranks that only sent their shard.
        is_judged: it must agree with plain torch.
        figures: how the rank's part compares; None if it is not judged, if plain torch did not
            record it, or if rank 0 has compared the same replicated tensor.
        misfit: how shape or dtype differ from plain torch's, in words; then there are no figures.
        copies: name of a leaf or shared unit that several ranks may hold -> SHA-256 of this rank's
            copy; all copies must be the same.
        step: how the rank's part of an updated weight compares; None for any other tensor.
        nonfinite: "ours", "torch" or "fp64" -> number of elements of the rank's part that are not
            finite there, if any.
        values: the shape that this rank holds, and small values, if the report is to show them.
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
    values: TensorValues | None = None


@dataclass(frozen=True)
class RankResult:
    """What one rank returns from one run of a case.

    Attributes:
        rank: which.
        recorded: in execution order.
        checks: the case's own claims.
        largest_bytes, largest_shape: of the largest storage the rank allocated.
        share_bytes: of the largest owned share of a weight.
        counts: the collectives of the run, without the prover's own gathers.
        seconds: that the run took.
        scheme: of the layers that ran, or the proof's if no layer was cut.
        contract: what the bits depend on: layers, dtypes and this rank's threads.
        curves: name of a training -> the loss of each of its steps.
        num_cut_parameters: number of parameters that no rank owns whole.
        has_cut_tensors: code of the model may receive cut tensors.
    """

    rank: int
    recorded: tuple[TensorRecord, ...]
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
    """Writes every tensor of a plain torch run to a file."""

    def __init__(self, writer: ReferenceWriter) -> None:
        self._writer = writer

    def record(self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions) -> None:
        self._writer.write(name, tensor)
        if how.step is not None and how.step.least is not None and how.step.most is not None:
            self._writer.set_aside(_least(name), how.step.least)
            self._writer.set_aside(_most(name), how.step.most)

    def set_aside(self, name: str, tensor: Tensor) -> None:
        self._writer.set_aside(name, tensor)


class _RankRecorder:
    """Hashes every tensor of a rank and compares the rank's part with the reference."""

    def __init__(self, axis: Axis, directory: Path, *, few: int = 0) -> None:
        self._axis = axis
        self._few = few
        self._plain = ReferenceReader(directory / PLAIN)
        self._precise = ReferenceReader(directory / PRECISE)
        self._reference_names = frozenset(self._plain.names())
        self.recorded: list[TensorRecord] = []

    def record(self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions) -> None:
        self._check_shape(name, tensor, layout)
        is_compared = how.judged and name in self._reference_names
        misfit = self._plain.misfit(name, layout, tensor.dtype) if is_compared else ""
        self.recorded.append(
            TensorRecord(
                name,
                layout.shape,
                dtype_name(tensor.dtype),
                layout.is_replicated,
                hash_tensor(tensor, layout, self._axis, who=name),
                how.judged,
                misfit=misfit,
                copies=hash_copies(tensor, layout),
                values=self._values(name, tensor, layout, is_compared and not misfit),
                **self._measured(name, tensor, layout, how, is_compared and not misfit),
            )
        )

    def _values(
        self, name: str, tensor: Tensor, layout: Layout, is_compared: bool
    ) -> TensorValues | None:
        """The shape and the small values that the report is to show."""
        shape = tuple(tensor.shape)
        if not self._few or math.prod(layout.shape) > self._few:
            return TensorValues(shape) if self._few else None
        ours = gather_whole(tensor, layout, self._axis, who=name)
        if self._axis.rank or not is_compared:
            return TensorValues(shape, None if self._axis.rank else ours)
        return TensorValues(shape, ours, self._plain.read(name, replicated(layout.shape)))

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Do nothing: only plain torch sets tensors aside."""

    def _check_shape(self, name: str, tensor: Tensor, layout: Layout) -> None:
        if tuple(tensor.shape) != layout.local_shape:
            raise ShapeError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} on {self._axis}, but its layout "
                f"gives this rank {layout.local_shape} of {layout.shape}. Hold what the layout "
                "says."
            )

    def _measured(
        self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions, is_compared: bool
    ) -> dict[str, Any]:
        """The fields of `TensorRecord` that compare this rank's part with the reference."""
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

    def _before(
        self, name: str, layout: Layout, step: OptimizerStep | None
    ) -> StepReference | None:
        if step is None or not self._plain.has_aside(_least(name)):
            return None
        return StepReference(
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
    """Number of elements that are NaN, or infinite where that is a fault."""
    if not (part.is_floating_point() or part.is_complex()):
        return 0
    return int((part.isnan() if may_be_infinite else ~part.isfinite()).sum().item())


def run_references(case: Case, *, scheme: Scheme | None, seed: int | None, directory: Path) -> None:
    """Run a case in plain torch, in fp64 and as it is written, and write both to `directory`.

    The fp64 run comes first: the other one measures the rounding of its gradients by it.
    """
    precise_gradient: PreciseGradient | None = None
    for name in (PRECISE, PLAIN):
        writer = ReferenceWriter(directory / name)
        run = CaseRun(
            axis=None,
            scheme=scheme,
            seed=seed,
            recorder=_FileRecorder(writer),
            is_precise=name == PRECISE,
            precise_gradient=precise_gradient,
        )
        case.work(run)
        writer.activation_bytes = run.activation_bytes
        writer.close()
        precise_gradient = ReferenceReader(directory / name).gradient


def run_on_rank(
    axis: Axis,
    *,
    case: Case,
    scheme: Scheme | None,
    seed: int | None,
    directory: Path,
    few: int = 0,
    part: PartOfTrainings | None = None,
) -> RankResult:
    """Run a case on this rank; all ranks of `axis` call this.

    Args:
        axis: the axis over which the case cuts its model.
        case: what to run.
        scheme: leaves and numerics; None: those of the layers.
        seed: random seed of everything that the case draws.
        directory: with the files that `run_references` wrote.
        few: keep the values of tensors with at most so many; 0 keeps none.
        part: which steps of its trainings the case does; None: all.
    """
    _try_products(scheme)
    started = time.perf_counter()
    axis.transport.ledger.reset()
    recorder = _RankRecorder(axis, directory, few=few)
    run = CaseRun(axis=axis, scheme=scheme, seed=seed, recorder=recorder)
    run.part = part
    case.work(run)
    return RankResult(
        axis.rank,
        tuple(recorder.recorded),
        tuple(run.checks),
        run.audit.largest_bytes,
        run.audit.largest_shape,
        run.share_bytes,
        _counts(axis.transport.ledger.as_dict()),
        time.perf_counter() - started,
        run.scheme,
        run.contract(),
        {name: tuple(losses) for name, losses in run.curves.items()},
        run.num_cut_parameters,
        run.has_cut_tensors,
    )


def _try_products(scheme: Scheme | None) -> None:
    """Make the checks that invariant layers make once per process, before the audit begins."""
    if scheme is None:
        mode.self_check()  # the layers raise if theirs is invariant and this found a difference
    elif scheme.is_invariant:
        mode.require_invariant()
    if scheme is None or scheme.is_invariant:
        for dtype in (torch.float32, torch.float64):
            mode.addmm_limit(dtype)


def _counts(table: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Counts:
    """The ledger without direction "prover"; forward and backward are always there."""
    counts: Counts = {"forward": {}, "backward": {}}
    for direction, kinds in table.items():
        if direction != "prover":
            counts[direction] = {kind: dict(figures) for kind, figures in kinds.items()}
    return counts
