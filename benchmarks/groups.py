"""The processes of a run: one group for each system and number of ranks, kept until it is closed.

The package's engines start and watch them. The BLAS mode is one per process, so ranks that are
threads, and a system without ranks, have a process of their own. Between calls a group sleeps.
"""

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from benchmarks.system import System, SystemRank
from benchmarks.systems import find_system
from benchmarks.work import Checked, Variant
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.errors import ShardproofError
from shardproof.numerics import mode
from shardproof.prover.case import as_it_lies
from shardproof.prover.compare import tolerance
from shardproof.ranks import open_ranks

TIMEOUT = 300.0  # seconds that a rank waits for another one; a peer may compile at its start
TAIL = 15  # lines of a group's output that are shown when it fails

Reference = Mapping[str, tuple[Tensor, float]]  # name -> the whole tensor, its largest element


class Key(NamedTuple):
    """One group of processes: a system on a number of ranks."""

    system: str
    ranks: int


class SystemFailure(Exception):  # noqa: N818 - what happened to a system, not to us
    """A system did not do its part; its processes have been ended."""


class Groups:
    """All groups of a run. Leaving it as a context manager ends them.

    Args:
        has_modes: True to give each system the BLAS mode that it needs, False to start all groups
            with this process's environment.

    Attributes:
        folder: for files of the run, removed with it.
    """

    def __init__(self, *, has_modes: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shardproof-bench-"))
        self._has_modes = has_modes
        self._groups: dict[Key, Ranks] = {}
        self._failures: dict[Key, str] = {}

    def start(self, keys: Iterable[Key]) -> None:
        """Start the groups that do not run yet, all at once; one that has failed stays so."""
        for key in keys:
            if key not in self._groups and key not in self._failures:
                self._groups[key] = self._open(key)

    def run(self, key: Key, fn: Callable[[SystemRank], Any]) -> list[Any]:
        """Call `fn` on every rank of a group; the results in rank order.

        Raises:
            SystemFailure: a rank raised or ended, now or in an earlier call.
        """
        if key in self._failures:
            raise SystemFailure(self._failures[key])
        system, log = find_system(key.system), self._log(key)
        call = functools.partial(_in_process, system=system, ranks=key.ranks, fn=fn, log=log)
        try:
            results = self._groups[key].run(call)
        except ShardproofError as error:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            self._failures[key] = "\n".join([str(error).rstrip(), *lines[-TAIL:]])
            self.close([key])
            raise SystemFailure(self._failures[key]) from error
        return results if system.engine == "processes" else results[0]

    def close(self, keys: Iterable[Key]) -> None:
        """End groups; one that does not run is fine."""
        for key in set(keys) & set(self._groups):
            self._groups.pop(key).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(self._groups)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _log(self, key: Key) -> Path:
        return self.folder / f"{key.system}-{key.ranks}.log"

    def _open(self, key: Key) -> Ranks:
        system = find_system(key.system)
        has_processes = system.engine == "processes"
        options: dict[str, Any] = {"environment": environment(system)} if self._has_modes else {}
        return open_ranks(
            key.ranks if has_processes else 1,
            "processes",
            threads=system.threads,
            timeout=TIMEOUT,
            transport=system.transport if has_processes else "auto",
            **options,
        )


def environment(system: System) -> dict[str, str]:
    """The variables that a system's processes start with: this process's, and a BLAS mode.

    Only invariant numerics need a mode of the BLAS library. All others get the library's default.
    """
    blas = os.environ.get(mode.VARIABLE, "auto") if system.is_invariant else "off"
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MKL_CBWR", "MKL_NUM_THREADS")  # they would decide before we do
    }
    programs = str(Path(sys.executable).parent)  # a peer looks there for what compiles its kernels
    path = os.pathsep.join(filter(None, [programs, inherited.get("PATH")]))
    return inherited | {mode.VARIABLE: blas, "PATH": path}


# -- in the processes of a group -------------------------------------------------------------------


def _in_process(
    axis: Axis, *, system: System, ranks: int, fn: Callable[[SystemRank], Any], log: Path
) -> Any:
    """Call `fn` on the rank, or on all ranks, that this process has."""
    _print_to(log)
    call = functools.partial(_on_rank, system=system, fn=fn)
    if system.engine == "threads":
        return _threads(ranks, system.threads).run(call)
    return call(axis) if system.engine == "processes" else [call(None)]


def _on_rank(axis: Axis | None, *, system: System, fn: Callable[[SystemRank], Any]) -> Any:
    rank = system.join(axis)
    if axis is not None and rank.wire is None:
        rank.wire = axis.transport.name
    return fn(rank)


@functools.cache
def _print_to(log: Path) -> None:
    """Send what libraries print to a file: it must not stand between the tables."""
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


@functools.cache
def _threads(ranks: int, threads: int) -> Ranks:
    """Ranks of this process, which live as long as it does."""
    return open_ranks(ranks, "threads", threads=threads, timeout=TIMEOUT)


# -- on one rank -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstStep:
    """What a rank's first step gave.

    Attributes:
        wire: what carries its bytes in truth; None without ranks.
        contract: what its bits depend on; None for others than ours.
        faults: what is wrong, as sentences; empty if nothing.
        hashes: name of a tensor -> SHA-256 of the whole; of invariant systems alone.
        figures: what was counted.
    """

    wire: str | None
    contract: str | None
    faults: tuple[str, ...]
    hashes: dict[str, str]
    figures: dict[str, float]


def first_step(rank: SystemRank, *, variant: Variant, folder: Path, keeps: bool) -> FirstStep:
    """Make the task of a variant and look at what its first step computes.

    Args:
        rank: of the system.
        variant: to be looked at.
        folder: of the yardstick's tensors.
        keeps: True for the yardstick, which writes them.
    """
    task = variant.make(rank)
    shown = [replace(each, tensor=as_it_lies(each.tensor, each.layout)) for each in task.checked()]
    if keeps:
        write_reference([each for each in shown if each.expected is None], folder)
    hashes = {each.name: rank.hash(each.name, each.tensor, each.layout) for each in shown}
    return FirstStep(
        rank.wire,
        rank.contract,
        tuple(faults(shown, read_reference(folder))),
        {name: sha for name, sha in hashes.items() if sha is not None},
        task.figures(),
    )


def stamps(rank: SystemRank, *, variant: Variant) -> list[int]:
    """Nanoseconds on the machine's clock at the end of a task's warm-up and of every step."""
    step, clock = variant.make(rank).step, time.monotonic_ns
    for _ in range(variant.warm_up):
        step()
    ends = [clock()]
    for _ in range(variant.steps):
        step()
        ends.append(clock())
    return ends


def write_reference(shown: Iterable[Checked], folder: Path) -> None:
    """Leave a yardstick's tensors, which are whole, for the others."""
    for place, each in enumerate(shown):
        largest = each.tensor.abs().max()
        torch.save((each.name, each.tensor.contiguous(), largest), folder / f"{place:03}.pt")


def read_reference(folder: Path) -> Reference:
    """Plain torch's results; each tensor is read from its file on first use."""
    reference = {}
    for path in sorted(folder.glob("*.pt")):
        name, tensor, largest = torch.load(path, mmap=True, weights_only=True)
        reference[name] = tensor, float(largest)
    return reference


def faults(shown: Iterable[Checked], reference: Reference) -> list[str]:
    """What is wrong with a rank's tensors, by the prover's rule.

    A tensor that the reference has and the rank does not show is wrong too.
    """
    missing = dict.fromkeys(reference)
    wrong = []
    for each in shown:
        missing.pop(each.name, None)
        fault = _fault(each, reference)
        if fault is not None:
            wrong.append(f"{each.name} {fault}")
    return wrong + [f"{name} was not computed" for name in missing]


def _fault(each: Checked, reference: Reference) -> str | None:
    expected, largest = each.expected, 0.0
    if expected is not None:
        largest = float(expected.abs().max())
    elif each.name in reference:
        expected, largest = reference[each.name]
        if tuple(expected.shape) != each.layout.shape:
            return f"has shape {each.layout.shape}, not {tuple(expected.shape)}"
        if each.layout.dim is not None:
            owned = each.layout.owned
            expected = expected.narrow(each.layout.dim, owned.start, len(owned))
    else:
        return "is not what plain torch computes at all"
    if each.tensor.shape != expected.shape:
        return f"is held as {tuple(each.tensor.shape)}, not {tuple(expected.shape)}"
    difference = (each.tensor - expected).abs().max() if each.tensor.numel() else torch.zeros(())
    if not difference.isfinite():
        return "has NaN or Inf where plain torch has none"
    rtol, atol = tolerance(each.tensor.dtype)
    allowed = rtol * largest + atol
    if float(difference) <= allowed:
        return None
    return f"differs from plain torch by {float(difference):.2e}, and {allowed:.2e} is allowed"
