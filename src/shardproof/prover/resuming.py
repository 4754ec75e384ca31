"""`prove --resume`: every training is saved at one degree, and goes on at another.

A case runs in three ways on ranks of its own: whole; up to the middle of its training, where it is
saved; and from there on, on a new model whose parameters are NaN until the checkpoint is loaded.
The tensors of the latter two must have the bits of the whole run. All record what was saved
(parameters, states of the optimizer, counts of random draws), so that a fault of the checkpoint is
found under the name of the tensor. The checkpoints of all degrees must have the same bytes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardproof.axis import Axis
from shardproof.checkpoint.entries import draws_of, weights_of
from shardproof.checkpoint.load import load
from shardproof.checkpoint.manifest import read_manifest
from shardproof.checkpoint.save import save
from shardproof.errors import ShardproofError
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.recording import RankResult, run_on_rank
from shardproof.prover.training import record_parameters, record_state

WHOLE, SAVED, RESUMED = "whole", "saved", "resumed"
_IN_CHECKPOINT = "saved: "  # begins the names of what a checkpoint has
_TEXTS = {WHOLE: "unbroken", SAVED: "up to the checkpoint", RESUMED: "from the checkpoint"}
LEAST_STEPS = 2  # of a training with an optimizer, so that one step follows the checkpoint

# Runs a function on so many ranks; the results in rank order.
RunRanks = Callable[[int, Callable[[Axis], RankResult]], Sequence[RankResult]]
Hashes = dict[str, frozenset[str]]  # tensor -> SHA-256 on the ranks that have one


@dataclass(frozen=True)
class Resumption:
    """Which part of its trainings a run of a case does.

    Attributes:
        part: WHOLE, SAVED (up to the checkpoint) or RESUMED (from it).
        folder: with a checkpoint for each training.
    """

    part: str
    folder: Path

    def steps(
        self, run: CaseRun, model: nn.Module, optimizer: Optimizer | None, total: int, name: str
    ) -> Iterator[int]:
        """The steps of a training that this run does.

        Args:
            run: of the case.
            model: as it was created.
            optimizer: as it was created; None for a case without updates.
            total: number of steps of the whole training.
            name: of the training; a case may have several.

        Comm:
            setup as `save` and `load`.
        """
        total = total if optimizer is None else max(total, LEAST_STEPS)
        middle, path = total // 2, self.folder / f"training {name}".strip()
        start = 0
        if self.part == RESUMED:
            with run.audit.paused():
                _forget(model)
                start = load(path, model, optimizer).step
            _record(run, model, optimizer, name)
        for step in range(start, total):
            if step == middle and self.part != RESUMED:
                _record(run, model, optimizer, name)
                if self.part == SAVED:
                    with run.audit.paused():
                        save(path, model, optimizer, step=step)
                    return
            yield step


@torch.no_grad()
def _forget(model: nn.Module) -> None:
    """Overwrite all parameters and buffers of floating point, which only `load` brings back."""
    for entry in weights_of(model):
        if entry.tensor.is_floating_point():
            entry.tensor.fill_(torch.nan)


def _record(run: CaseRun, model: nn.Module, optimizer: Optimizer | None, name: str) -> None:
    """Record what a checkpoint has."""
    prefix = f"{name}: {_IN_CHECKPOINT}" if name else _IN_CHECKPOINT
    record_parameters(run, model, prefix=prefix, judged=False)
    if optimizer is not None:
        record_state(run, model, optimizer, prefix=prefix, judged=False)
    for place, module in draws_of(model).items():
        run.record(f"{prefix}draws of {place}", torch.tensor(module.step), judged=False)


@dataclass(frozen=True)
class ResumeReport:
    """Whether a case that was saved and resumed has the bits of the whole run.

    Attributes:
        case: its name.
        pairs: the degree that saved and the degree that went on, for each run.
        num_tensors: number of tensors of the whole run.
        fault: what is wrong, as the end of a sentence; "" if nothing is.
    """

    case: str
    pairs: tuple[tuple[int, int], ...]
    num_tensors: int
    fault: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "case": self.case,
            "pairs": [list(pair) for pair in self.pairs],
            "tensors": self.num_tensors,
            "same": not self.fault,
            "fault": self.fault,
        }


def prove_resume(
    case: Case,
    degrees: Sequence[int],
    run_ranks: RunRanks,
    *,
    folder: Path,
    announce: Callable[[str], None],
    **options: Any,
) -> ResumeReport:
    """Save a case at every degree, and let it go on at every degree from another one's checkpoint.

    Args:
        case: the case.
        degrees: that save and go on.
        run_ranks: runs a function on ranks.
        folder: for the checkpoints; all ranks can write there.
        announce: is called with a text before each run.
        options: of `run_on_rank`.

    Returns:
        The outcome; errors of shardproof are its fault.
    """

    def run(part: str, degree: int, where: int) -> Hashes:
        announce(f"{case.name}, {_TEXTS[part]} at degree {degree}")
        resumption = Resumption(part, folder / f"degree {where}")
        work = functools.partial(run_on_rank, case=case, part=resumption, **options)
        return _hashes(run_ranks(degree, work))

    pairs = tuple((degrees[place - 1], degree) for place, degree in enumerate(degrees))
    whole = run(WHOLE, degrees[0], 0)
    report = ResumeReport(case.name, pairs, len(whole))
    before: dict[int, Hashes] = {}
    for degree in degrees:
        try:
            before[degree] = run(SAVED, degree, degree)
        except ShardproofError as error:
            return replace(report, fault=f"saving at degree {degree} failed: {error}")
        difference = _other_bytes(folder, degrees[0], degree)
        if difference:
            return replace(report, fault=difference)
    for saved_at, degree in pairs:
        what = f"resumed at degree {degree} from the checkpoint of degree {saved_at}"
        try:
            after = run(RESUMED, degree, saved_at)
        except ShardproofError as error:
            return replace(report, fault=f"{what}: {error}")
        difference = _first_difference(whole, before[saved_at], after)
        if difference:
            return replace(report, fault=f"{what}: {difference}")
    return report


def _hashes(results: Sequence[RankResult]) -> Hashes:
    hashes: dict[str, set[str]] = {}
    for result in results:
        for record in result.recorded:
            mine = hashes.setdefault(record.name, set())
            if record.sha256 is not None:
                mine.add(record.sha256)
    return {name: frozenset(values) for name, values in hashes.items()}


def _first_difference(whole: Hashes, before: Hashes, after: Hashes) -> str:
    """The first tensor whose bits differ between the whole run and one of its parts."""
    for name, values in whole.items():
        if name not in after and (name not in before or _IN_CHECKPOINT in name):
            return f"tensor {name} is missing"
        for part in (before, after):
            if part.get(name, values) != values:
                return f"tensor {name} is the first with other bits than in the unbroken run"
    more = next((name for name in after if name not in whole), None)
    return "" if more is None else f"tensor {more} is not in the unbroken run"


def _other_bytes(folder: Path, first: int, degree: int) -> str:
    """The first tensor or file of a checkpoint that has other bytes than that of another degree."""
    for path in sorted((folder / f"degree {first}").iterdir()):
        theirs = read_manifest(path)["files"]
        mine = read_manifest(folder / f"degree {degree}" / path.name)["files"]
        for name in sorted({*theirs, *mine}):
            tensors = _tensors(theirs, name), _tensors(mine, name)
            for tensor in {**tensors[0], **tensors[1]}:
                if tensors[0].get(tensor) != tensors[1].get(tensor):
                    what = f"tensor {tensor!r} of {name}" if tensor else f"the file {name}"
                    return (
                        f"{what} has other bytes in the checkpoint of degree {degree} than in that "
                        f"of degree {first}"
                    )
    return ""


def _tensors(files: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    return dict(files[name]["tensors"]) if name in files else {}
