"""Proofs on a device: the cases of `shardproof prove`, with ranks as threads that share it."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shardproof.prover import Case, CaseRun, Report, prove_cases
from shardproof.prover.cases import all_cases, find_case
from shardproof.prover.proof import Progress

DEGREES = (1, 2, 3, 8)
TEACHING = tuple(case.name for case in all_cases() if case.source)
LLAMA = "llama"


@dataclass(frozen=True)
class OnDevice:
    """The work of a case, with its model and its data on one device.

    Attributes:
        work: of the case.
        device: where both are to be.
    """

    work: Callable[[CaseRun], None]
    device: torch.device

    def __call__(self, run: CaseRun) -> None:
        """Run on one rank, or in plain torch."""
        run.device = self.device
        self.work(run)


def on_device(case: Case, device: torch.device) -> Case:
    """The same case on a device."""
    return dataclasses.replace(case, work=OnDevice(case.work, device))


def why_not(name: str) -> str:
    """Why a case cannot run here; empty if it can."""
    module = find_case(name).module
    if not module or importlib.util.find_spec(module) is not None:
        return ""
    return f"{module} cannot be imported"


def prove(
    name: str,
    device: torch.device,
    *,
    degrees: Sequence[int] = DEGREES,
    progress: Progress | None = None,
) -> Report:
    """Prove one case on a device: same bits at every degree, and close to plain torch there.

    Args:
        name: of the case.
        device: where its model and its data are to be.
        degrees: how many ranks.
        progress: called before each run.
    """
    case = on_device(find_case(name), device)
    return prove_cases([case], degrees=degrees, threads=1, progress=progress)
