"""Runs cases in plain torch and at several degrees, and reports: what `shardproof prove` calls.

The ranks are started here (`prove_cases`) or by torchrun (`prove_under_torchrun`). Under torchrun
the degree is torchrun's, and degree 1 runs on rank 0 alone. After any work of a single rank all
ranks exchange how it went, so all of them raise or none does. There is no such exchange inside a
case: a rank that raises there leaves the others in a collective, and torchrun ends them when that
rank exits.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from shardproof.axis import Axis
from shardproof.error_text import text_of
from shardproof.errors import RankError, ShapeError, UsageError
from shardproof.numerics import mode
from shardproof.prover.case import Case
from shardproof.prover.case_report import CaseReport
from shardproof.prover.fault_location import RankSearch, locate, search_on_rank
from shardproof.prover.judge import agreed_contract, judge_case
from shardproof.prover.recording import (
    PLAIN,
    RankResult,
    ReferenceReader,
    run_on_rank,
    run_references,
)
from shardproof.prover.report import Report
from shardproof.prover.resuming import ResumeReport, RunRanks, prove_resume
from shardproof.ranks import open_ranks
from shardproof.scheme import Scheme, checked_degrees
from shardproof.torchrun import host_of
from shardproof.transport.base import Call

DEGREES = (1, 2, 3, 8)
DEFAULT_SEED = 12345  # that of the teaching notebook on the gathered MLP

T = TypeVar("T")
Progress = Callable[[int, int, str], None]  # (runs done, all runs, what comes next)
Results = dict[str, dict[int, list[RankResult]]]  # case -> degree -> every rank's result
References = dict[str, Path]  # case -> directory of its plain torch runs


@dataclass(frozen=True)
class ProofSettings:
    """What all runs of one proof have in common.

    Attributes:
        cases: to run; each name once.
        scheme: leaves and numerics; None: those of the layers.
        seed: random seed of everything that the cases draw; None: the scheme's.
        skipped: cases left out, for the report: name and extra.
        allow_nonfinite: NaN and Inf are no fault.
        few: the report shows the values of tensors with at most so many; 0: of none.
        resumes: every case is also saved and resumed.
    """

    cases: Sequence[Case]
    scheme: Scheme | None
    seed: int | None
    skipped: Sequence[dict[str, str]] = ()
    allow_nonfinite: bool = False
    few: int = 0
    resumes: bool = False

    def num_runs(self, num_degrees: int) -> int:
        """Number of runs of the proof, of plain torch and of ranks."""
        per_case = 1 + num_degrees + ((1 + 2 * num_degrees) if self.resumes else 0)
        return len(self.cases) * per_case

    def make_references(self, folder: Path, progress: "ProgressCounter") -> References:
        """Run every case in plain torch, and write the tensors to a folder."""
        references = {}
        for index, case in enumerate(self.cases):
            progress(f"{case.name}, plain torch")
            references[case.name] = folder / str(index)
            run_references(
                case, scheme=self.scheme, seed=self.seed, directory=references[case.name]
            )
        return references

    def work(self, case: Case, references: References) -> Callable[[Axis], RankResult]:
        """What every rank is to run."""
        return functools.partial(
            run_on_rank,
            case=case,
            scheme=self.scheme,
            seed=self.seed,
            directory=references[case.name],
            few=self.few,
        )

    def resume(
        self,
        degrees: Sequence[int],
        run_ranks: RunRanks,
        folder: Path,
        references: References,
        announce: Callable[[str], None],
    ) -> tuple[ResumeReport, ...]:
        """Save and resume every case, if that is wanted.

        Args:
            degrees: that save and go on.
            run_ranks: runs a function on ranks.
            folder: for the checkpoints.
            references: of the cases.
            announce: is called with a text before each run.
        """
        return tuple(
            prove_resume(
                case,
                degrees,
                run_ranks,
                folder=folder / f"{index} checkpoints",
                announce=announce,
                scheme=self.scheme,
                seed=self.seed,
                directory=references[case.name],
            )
            for index, case in enumerate(self.cases if self.resumes else ())
        )

    def judge(self, results: Results, references: References) -> tuple[CaseReport, ...]:
        """Judge every case; its references must still be in their files."""
        plain = {name: ReferenceReader(folder / PLAIN) for name, folder in references.items()}
        return tuple(
            judge_case(
                case,
                results[case.name],
                expected=plain[case.name].names(),
                activation_bytes=plain[case.name].activation_bytes,
                allows_nonfinite=self.allow_nonfinite,
            )
            for case in self.cases
        )

    def report(self, judged: Sequence[CaseReport], results: Results, **ranks: Any) -> Report:
        """The report of all cases.

        Args:
            judged: one report for each case.
            results: of all ranks.
            ranks: the fields of `Report` on degrees, engine and transport.

        Raises:
            MismatchError: ranks, degrees or cases ran under different contracts.
        """
        scheme, contract = agreed_contract(results)
        return Report(
            cases=tuple(judged),
            numerics=scheme.numerics,
            leaves=scheme.leaves,
            seed=scheme.seed if self.seed is None else self.seed,
            contract=contract,
            skipped=tuple(self.skipped),
            audits_creation=all(
                getattr(case.work, "measures_creation", True) for case in self.cases
            ),
            **ranks,
        )


@dataclass(frozen=True)
class FaultSearch:
    """Finds where a case goes wrong, on ranks of its own.

    Attributes:
        settings: of the proof.
        engine: what the ranks are.
        options: how the ranks are opened.
    """

    settings: ProofSettings
    engine: str
    options: Mapping[str, Any]

    def add_location(
        self, case: Case, report: CaseReport, results: Mapping[int, Sequence[RankResult]]
    ) -> CaseReport:
        """The report with the place of its fault, if the model's code receives cut tensors."""
        has_cut_tensors = any(rank.has_cut_tensors for ranks in results.values() for rank in ranks)
        if not has_cut_tensors or (report.identical and report.agrees_with_torch):
            return report
        difference = report.first_difference() or {}
        where = locate(self._runner(case), difference["degrees"], report.degrees)
        return replace(report, where=where)

    @contextmanager
    def adding_note(self, case: Case, degree: int) -> Iterator[None]:
        """Add to an error of the block the operation on cut tensors that caused it, if any."""
        try:
            yield
        except (RankError, ShapeError) as error:
            searches = self._runner(case)(degree, True)
            where = next((each.where for each in searches if each.where is not None), None)
            if where is not None and where.operation:
                error.add_note(f"{where}")
            raise

    def _runner(self, case: Case) -> Callable[[int, bool], Sequence[RankSearch]]:
        """A function that runs the case again at a degree, checked or not; 0 is plain torch."""
        common: dict[str, Any] = {
            "case": case,
            "scheme": self.settings.scheme,
            "seed": self.settings.seed,
        }

        def run(degree: int, is_checked: bool) -> Sequence[RankSearch]:
            if not degree:
                return [search_on_rank(None, **common, is_checked=False)]
            with open_ranks(degree, self.engine, **self.options) as ranks:
                return ranks.run(functools.partial(search_on_rank, **common, is_checked=is_checked))

        return run


def prove_cases(
    cases: Sequence[Case],
    *,
    degrees: Sequence[int] = DEGREES,
    engine: str = "threads",
    threads: int | None = None,
    transport: str = "auto",
    scheme: Scheme | None = Scheme(),  # noqa: B008 - frozen
    seed: int | None = DEFAULT_SEED,
    progress: Progress | None = None,
    skipped: Sequence[dict[str, str]] = (),
    allow_nonfinite: bool = False,
    few: int = 0,
    resume: bool = False,
) -> Report:
    """Run every case in plain torch and at every degree, and compare.

    Args:
        cases: what to run; each name once.
        degrees: how many ranks; each is run once, lowest first.
        engine: what the ranks are: "threads" or "processes".
        threads: intra-op threads of each rank; by default the ranks share this process's.
        transport: what carries bytes between the ranks, as in `launch`.
        scheme: leaves and numerics; None: those of the layers, which must be the same.
        seed: random seed of everything that the cases draw; None: the scheme's.
        progress: called before each run, and once at the end.
        skipped: cases left out, for the report: name and extra.
        allow_nonfinite: whether a tensor with NaN or Inf may be proved.
        few: the report shows the values of tensors with at most so many.
        resume: also save every case at every degree, and let it go on at another one.

    Raises:
        DegreeError: the leaves cannot serve a degree.
        UsageError: no case or no degree, a name twice, an extra that is not installed, or a layer
            with another scheme.
        MismatchError: ranks, degrees or cases ran under different contracts.
        NumericsError: this process cannot promise the bits.
    """
    degrees = checked_degrees(degrees, scheme)
    check_cases(cases)
    threads = threads_of_ranks(threads, degrees)
    settings = ProofSettings(cases, scheme, seed, skipped, allow_nonfinite, few, resume)
    count = ProgressCounter(progress, total=settings.num_runs(len(degrees)))
    # Inputs that differ between ranks are no error here: the report names the tensors that do.
    options = {
        "threads": threads,
        "transport": transport,
        "compare_inputs": False,
    }
    search = FaultSearch(settings, engine, options)
    case_reports, results, used = _run_degrees(search, degrees, count)
    count("done")
    return settings.report(case_reports, results, degrees=degrees, engine=engine, **used)


def _run_degrees(
    search: FaultSearch, degrees: Sequence[int], count: "ProgressCounter"
) -> tuple[tuple[CaseReport, ...], Results, dict[str, Any]]:
    """Run every case in plain torch and at every degree, judge it, and resume it.

    Returns:
        Reports, results, and further fields of `Report`: how the ranks of the highest degree
        exchanged their bytes, and what was resumed.
    """
    settings, cases = search.settings, search.settings.cases
    results: Results = {case.name: {} for case in cases}
    used: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shardproof-") as folder:
        references = settings.make_references(Path(folder), count)
        for degree in degrees:
            with open_ranks(degree, search.engine, **search.options) as ranks:
                used = {"transport": ranks.transport, "transport_note": ranks.transport_note}
                for case in cases:
                    count(f"{case.name}, degree {degree}")
                    with search.adding_note(case, degree):
                        results[case.name][degree] = ranks.run(settings.work(case, references))
        case_reports = settings.judge(results, references)

        def run_ranks(degree: int, work: Callable[[Axis], RankResult]) -> Sequence[RankResult]:
            with open_ranks(degree, search.engine, **search.options) as ranks:
                return ranks.run(work)

        used["resumed"] = settings.resume(degrees, run_ranks, Path(folder), references, count)
    located = tuple(
        search.add_location(case, report, results[case.name])
        for case, report in zip(cases, case_reports, strict=True)
    )
    return located, results, used


def prove_under_torchrun(
    cases: Sequence[Case],
    axis: Axis,
    *,
    threads: int | None = None,
    scheme: Scheme = Scheme(),  # noqa: B008 - frozen
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
    skipped: Sequence[dict[str, str]] = (),
    allow_nonfinite: bool = False,
    few: int = 0,
    resume: bool = False,
) -> Report | None:
    """Run every case on torchrun's ranks, and on rank 0 alone; every rank calls this.

    Args:
        cases: what to run; each name once, the same on every rank.
        axis: torchrun's ranks, from `Axis.from_env()`.
        threads: intra-op threads of each rank; None leaves them as they are.
        scheme: leaves and numerics.
        seed: random seed of everything that the cases draw.
        progress: called on rank 0 before each run, and once at the end.
        skipped: cases left out, for the report: name and extra.
        allow_nonfinite: whether a tensor with NaN or Inf may be proved.
        few: the report shows the values of tensors with at most so many.
        resume: as in `prove_cases`, in a folder for temporary files that all ranks share.

    Returns:
        The report on rank 0, None on the others.

    Raises:
        DegreeError, UsageError, NumericsError: as `prove_cases` does, on every rank.
        RankError: on the ranks without an error of their own, if another rank raised.
    """
    degrees = checked_degrees({1, axis.size}, scheme)
    if threads is not None:
        torch.set_num_threads(threads)
    settings = ProofSettings(cases, scheme, seed, skipped, allow_nonfinite, few, resume)
    count = ProgressCounter(
        progress if axis.rank == 0 else None, total=settings.num_runs(len(degrees))
    )
    with tempfile.TemporaryDirectory(prefix="shardproof-") as folder:
        references = _share_references(settings, axis, Path(folder), count)
        alone = _run_together(axis, lambda: _run_alone(settings, axis, references, count))[0]
        own = _run_all(settings, axis, references, count) if axis.size > 1 else {}
        shared = Path(axis.gather_small(folder, what="the folder of checkpoints")[0])
        run_ranks = functools.partial(_run_here, axis)
        resumed = settings.resume(degrees, run_ranks, shared, references, count)
        # No host may remove its references before this gather: until then ranks read them.
        everyone = axis.transport.gather_objects(own, call=Call("gather", "prover", "report"))
        if axis.rank:
            return None
        results: Results = {case.name: {1: [alone[case.name]]} for case in cases}
        for case in cases if axis.size > 1 else ():
            results[case.name][axis.size] = [rank[case.name] for rank in everyone]
        case_reports = settings.judge(results, references)
    count("done")
    used: dict[str, Any] = {"transport": axis.transport.name, "resumed": resumed}
    used["transport_note"] = axis.transport_note
    return settings.report(case_reports, results, degrees=degrees, engine="torchrun", **used)


def _run_here(axis: Axis, degree: int, work: Callable[[Axis], RankResult]) -> Sequence[RankResult]:
    """Run a function on torchrun's ranks, or at degree 1 on rank 0; all ranks get all results."""
    if degree > 1:
        return _run_together(axis, lambda: work(axis))
    results = _run_together(axis, lambda: None if axis.rank else work(Axis.solo()))
    return [result for result in results if result is not None]


def _share_references(
    settings: ProofSettings, axis: Axis, folder: Path, count: "ProgressCounter"
) -> References:
    """The references of this host: its first rank makes them and sends the others their paths."""
    host, is_first = host_of(os.environ)

    def make() -> tuple[str, References | None]:
        check_cases(settings.cases)
        return host, settings.make_references(folder, count) if is_first else None

    for other, references in _run_together(axis, make):
        if other == host and references is not None:
            return references
    raise RankError(
        f"no rank on host {host!r} has LOCAL_RANK=0, so nobody there made the reference. "
        f"Start the ranks with torchrun, which sets it."
    )


def _run_alone(
    settings: ProofSettings, axis: Axis, references: References, count: "ProgressCounter"
) -> dict[str, RankResult]:
    """Degree 1 on rank 0; the other ranks do nothing."""
    return {} if axis.rank else _run_all(settings, Axis.solo(), references, count)


def _run_all(
    settings: ProofSettings, axis: Axis, references: References, count: "ProgressCounter"
) -> dict[str, RankResult]:
    results = {}
    for case in settings.cases:
        count(f"{case.name}, degree {axis.size}")
        results[case.name] = settings.work(case, references)(axis)
    return results


def _run_together(axis: Axis, work: Callable[[], T]) -> list[T]:
    """Call `work` on every rank, without collectives in it; return all results, or all raise.

    Raises:
        RankError: another rank raised; this one's own error is raised as it is.
    """
    error: Exception | None = None
    value: Any = None
    try:
        value = work()
    except Exception as raised:  # sent to the others, then raised again
        error = raised
    outcome = (value, None if error is None else text_of(error))
    everyone = axis.transport.gather_objects(outcome, call=Call("gather", "prover", "outcome"))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise RankError(f"rank {rank} of {axis.size} raised {message}", rank=rank)
    return [value for value, _ in everyone]


class ProgressCounter:
    """Counts runs for a progress callback."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress, self._total, self._num_done = progress, total, 0

    def __call__(self, text: str) -> None:
        """Report what comes next; all runs before it are done."""
        if self._progress is not None:
            self._progress(min(self._num_done, self._total), self._total, text)
        self._num_done += 1


def threads_of_ranks(threads: int | None, degrees: Sequence[int]) -> int:
    """Intra-op threads of each rank, the same at all degrees: they may belong to the contract.

    Args:
        threads: as requested; None shares this process's threads among the most ranks.
        degrees: that are to be run.
    """
    return max(1, torch.get_num_threads() // max(degrees)) if threads is None else threads


def coming_contract(scheme: Scheme, threads: int) -> str:
    """The contract under which ranks with so many threads will run fp32 layers on the CPU."""
    with open_ranks(1, threads=threads) as ranks:
        return ranks.run(lambda axis: mode.contract(scheme))[0]


def check_cases(cases: Sequence[Case]) -> None:
    """Raise unless there is a case, no name occurs twice, and every extra is installed.

    Raises:
        UsageError: no case, a name twice, or an extra that is not installed.
    """
    names = [case.name for case in cases]
    if not names:
        raise UsageError("no case to prove. Name one or more.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"case {twice[0]!r} is there twice. Give every case its own name.")
    for case in cases:
        if not case.is_installed:
            raise UsageError(
                f"case {case.name!r} needs the extra {case.extra!r}, which is not installed. "
                f"Install shardproof[{case.extra}], or leave the case out."
            )
