"""Runs cases at several degrees and reports: what `shardproof prove` and `sp.prove` call."""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.errors import RankError, ShapeError
from shardproof.objects import checked_model
from shardproof.prover.case import Case, Trial
from shardproof.prover.casereport import CaseReport
from shardproof.prover.contract import agreed_contract, threads_of_ranks
from shardproof.prover.given import (
    check_cases,
    check_function,
    checked_batch,
    checked_degrees,
)
from shardproof.prover.judge import judge_case
from shardproof.prover.reference import Reference
from shardproof.prover.report import Report
from shardproof.prover.runs import RankResult, run_on_rank, run_references
from shardproof.prover.training import Batch, Training
from shardproof.prover.update import MakeOptimizer, make_optimizer
from shardproof.prover.where import Found, locate, look
from shardproof.quantities import checked_flag, checked_name, checked_whole
from shardproof.ranks import open_ranks
from shardproof.scheme import Scheme

DEGREES = (1, 2, 3, 8)
DEFAULT_SEED = 12345  # the seed of the seed documents

GivenBatch = tuple[Tensor | tuple[Tensor, ...], Tensor]  # inputs, target
Progress = Callable[[int, int, str], None]  # (done, total, what comes next)
Results = dict[str, dict[int, list[RankResult]]]  # case -> degree -> every rank's result
References = dict[str, Reference]  # case -> where its plain torch runs lie


@dataclass(frozen=True)
class Carrier:
    """How the ranks of the highest degree exchanged their bytes.

    Attributes:
        transport: its name.
        note: why processes did not share memory; empty if there is nothing to say.
    """

    transport: str
    note: str


@dataclass(frozen=True)
class Proof:
    """What all runs of one proof have in common.

    Attributes:
        cases: what is run; each name once.
        scheme: leaves and numerics; None: those of the layers.
        seed: of everything the cases draw; None: the scheme's.
        skipped: cases left out, for the report: name and extra.
        allow_nonfinite: NaN and Inf are no fault.
        few: numbers of tensors with at most so many are in the report; 0: of none.
    """

    cases: Sequence[Case]
    scheme: Scheme | None
    seed: int | None
    skipped: Sequence[dict[str, str]] = ()
    allow_nonfinite: bool = False
    few: int = 0

    def make_references(self, folder: Path, tell: "Teller") -> References:
        """Run every case in plain torch, and leave the tensors in a folder."""
        references = {}
        for index, case in enumerate(self.cases):
            tell(f"{case.name}, plain torch")
            references[case.name] = run_references(
                case, scheme=self.scheme, seed=self.seed, directory=folder / str(index)
            )
        return references

    def work(self, case: Case, references: References) -> Callable[[Axis], RankResult]:
        """What every rank is to run."""
        return functools.partial(
            run_on_rank,
            case=case,
            scheme=self.scheme,
            seed=self.seed,
            reference=references[case.name],
            few=self.few,
        )

    def judge(self, results: Results, references: References) -> tuple[CaseReport, ...]:
        """Judge every case while its references still lie in their files."""
        plain = {name: reference.plain() for name, reference in references.items()}
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

    def all_located(
        self, judged: Sequence[CaseReport], results: Results, engine: str, options: dict[str, Any]
    ) -> tuple[CaseReport, ...]:
        """The reports, with the places of faults."""
        return tuple(
            self.located(case, report, results[case.name], engine, options)
            for case, report in zip(self.cases, judged, strict=True)
        )

    def located(
        self,
        case: Case,
        report: CaseReport,
        results: dict[int, list[RankResult]],
        engine: str,
        options: dict[str, Any],
    ) -> CaseReport:
        """The report, with the place of a fault in a model whose code meets cut tensors."""
        has_cut_tensors = any(rank.has_cut_tensors for ranks in results.values() for rank in ranks)
        if not has_cut_tensors or (report.identical and report.agrees_with_torch):
            return report

        difference = report.first_difference() or {}
        run = self._looking(case, engine, options)
        return replace(report, where=locate(run, difference["degrees"], report.degrees))

    def _looking(
        self, case: Case, engine: str, options: dict[str, Any]
    ) -> Callable[[int, bool], Sequence[Found]]:
        """Runs a case once more at a degree, checked or not; in plain torch at degree 0."""
        given: dict[str, Any] = {"case": case, "scheme": self.scheme, "seed": self.seed}

        def run(degree: int, is_checked: bool) -> Sequence[Found]:
            if not degree:
                return [look(None, **given, is_checked=False)]
            with open_ranks(degree, engine, **options) as ranks:
                return ranks.run(functools.partial(look, **given, is_checked=is_checked))

        return run

    @contextmanager
    def noting(
        self, case: Case, degree: int, engine: str, options: dict[str, Any]
    ) -> Iterator[None]:
        """Add to what a rank raises the operation on cut tensors that is to blame, if one is."""
        try:
            yield
        except (RankError, ShapeError) as error:
            found = self._looking(case, engine, options)(degree, True)
            where = next((each.where for each in found if each.where is not None), None)
            if where is not None and where.operation:
                error.add_note(f"{where}")
            raise

    def report(
        self,
        judged: tuple[CaseReport, ...],
        results: Results,
        *,
        degrees: tuple[int, ...],
        engine: str,
        carrier: Carrier,
    ) -> Report:
        """What came of it all.

        Raises:
            MismatchError: ranks, degrees or cases ran under different contracts.
        """
        scheme, contract = agreed_contract(results)
        return Report(
            cases=judged,
            degrees=degrees,
            engine=engine,
            transport=carrier.transport,
            transport_note=carrier.note,
            numerics=scheme.numerics,
            leaves=scheme.leaves,
            seed=scheme.seed if self.seed is None else self.seed,
            contract=contract,
            skipped=tuple(self.skipped),
            audits_creation=all(
                getattr(case.work, "measures_creation", True) for case in self.cases
            ),
        )


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
) -> Report:
    """Run every case in plain torch and at every degree, and compare.

    Args:
        cases: what to run; each name once.
        degrees: how many ranks; each is run once, lowest first.
        engine: what the ranks are: "threads" or "processes".
        threads: intra-op threads of each rank; by default this process's are shared out.
        transport: what carries bytes between the ranks, as in `launch`.
        scheme: leaves and numerics; None: those of the layers, which must be alike.
        seed: of everything the cases draw; None: the scheme's.
        progress: called before each run, and once at the end.
        skipped: cases left out, for the report: name and extra.
        allow_nonfinite: whether a tensor with NaN or Inf may be proved.
        few: show the numbers of tensors with at most so many in the report.

    Raises:
        DegreeError: a degree that the leaves cannot serve.
        UsageError: no case or no degree, a name twice, an extra that is not installed, or a layer
            with another scheme.
        MismatchError: ranks, degrees or cases ran under different contracts.
        NumericsError: this process cannot promise the bits.
    """
    degrees = checked_degrees(degrees, scheme)
    check_cases(cases)
    threads = threads_of_ranks(threads, degrees)
    proof = Proof(cases, scheme, seed, skipped, allow_nonfinite, few)
    tell = Teller(progress, total=len(cases) * (1 + len(degrees)))
    results: Results = {case.name: {} for case in cases}
    common = _of_ranks(threads=threads, transport=transport)
    carrier = Carrier("solo", "")
    with tempfile.TemporaryDirectory(prefix="shardproof-") as folder:
        references = proof.make_references(Path(folder), tell)
        for degree in degrees:
            with open_ranks(degree, engine, **common) as ranks:
                carrier = Carrier(ranks.transport, ranks.transport_note)
                for case in cases:
                    tell(f"{case.name}, degree {degree}")
                    with proof.noting(case, degree, engine, common):
                        results[case.name][degree] = ranks.run(proof.work(case, references))
        judged = proof.judge(results, references)
    judged = proof.all_located(judged, results, engine, common)
    tell("done")
    return proof.report(judged, results, degrees=degrees, engine=engine, carrier=carrier)


def _of_ranks(**options: Any) -> dict[str, Any]:
    """How ranks are opened: inputs that differ are no error, the report names what does."""
    return {**options, "compare_inputs": False}


def prove(
    build: Callable[[Axis | None], nn.Module],
    loss_fn: Callable[[Any, Tensor], Tensor],
    batch: GivenBatch,
    *,
    degrees: Sequence[int] = DEGREES,
    optimizer: MakeOptimizer | None = None,
    steps: int = 1,
    engine: str = "threads",
    threads: int | None = None,
    transport: str = "auto",
    scheme: Scheme | None = None,
    name: str = "model",
    audit_creation: bool = True,
    allow_nonfinite: bool = False,
) -> Report:
    """Prove that a model gives the same bits at every degree, and those of plain torch closely.

    Args:
        build: `build(axis)` makes the model of one rank, `build(None)` the plain torch module,
            with the same parameter names and numbers. Draw from a generator of your own.
        loss_fn: of `module(*inputs)`, which must be a tensor, and the target.
        batch: inputs (a tensor or a tuple of them) and target.
        degrees: how many ranks; each is run once, lowest first.
        optimizer: makes one for some parameters; None updates nothing.
        steps: how many; agreement with plain torch is judged on the first.
        engine: "threads" or "processes".
        threads: intra-op threads of each rank; by default this process's are shared out.
        transport: what carries bytes between the ranks, as in `launch`.
        scheme: that every layer must have; None: whatever they have, if they have it alike.
        name: of the model in the report.
        audit_creation: False leaves `build` out of the memory audit: it makes a model whole first.
        allow_nonfinite: whether NaN and Inf may be proved; those of a constant mask always may.

    Returns:
        A report; `report.proved` is the answer. It is False where a degree above 1 cut nothing.

    Raises:
        UsageError: an argument makes no sense, the module returns no tensor, or schemes differ.
        DegreeError: a degree is not positive or exceeds the leaves.
        NumericsError: the optimizer is a fused one, or this process cannot promise the bits.

    Example:
        >>> prove(build, loss_fn, (x, y), degrees=(1, 2)).proved  # doctest: +SKIP
    """
    degrees = checked_degrees(degrees, scheme)
    work = _training(build, loss_fn, batch, _checked_optimizer(optimizer), steps, audit_creation)
    return prove_cases(
        [Case(checked_name(name, "name"), "a model given to prove()", work)],
        degrees=degrees,
        engine=engine,
        threads=threads,
        transport=transport,
        scheme=scheme,
        seed=None,
        allow_nonfinite=allow_nonfinite,
    )


def _training(
    build: Callable[[Axis | None], nn.Module],
    loss_fn: Callable[[Any, Tensor], Tensor],
    batch: GivenBatch,
    optimizer: MakeOptimizer | None,
    steps: int,
    audit_creation: bool,
) -> Training:
    check_function(build, "build", example="a function of an axis that returns a module")
    check_function(loss_fn, "loss_fn", example="torch.nn.functional.mse_loss")
    return Training(
        functools.partial(_build, build),
        functools.partial(_given, *checked_batch(batch)),
        functools.partial(_loss, loss_fn),
        optimizer,
        checked_whole(steps, "steps"),
        measures_creation=checked_flag(audit_creation, "audit_creation"),
    )


def _checked_optimizer(make: MakeOptimizer | None) -> MakeOptimizer | None:
    """What was given; a fused one is refused before any run."""
    if make is not None:
        check_function(make, "optimizer", example="lambda p: torch.optim.SGD(p, lr=0.1)")
        make_optimizer(make, nn.Linear(1, 1, device="meta").to_empty(device="cpu"))
    return make


class Teller:
    """Counts runs for a progress callback."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, text: str) -> None:
        """Tell what comes next; what came before is done."""
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, text)
        self._done += 1


def _build(build: Callable[[Axis | None], nn.Module], trial: Trial) -> nn.Module:
    model = checked_model(build(trial.axis), what="what build returned")
    # Plain torch casts and trains what it is given, which may be the caller's own model, out of
    # which the ranks are about to be cut.
    return copy.deepcopy(model) if trial.is_reference else model


def _given(inputs: tuple[Tensor, ...], target: Tensor, trial: Trial) -> Batch:
    return Batch(inputs, target)


def _loss(
    loss_fn: Callable[[Any, Tensor], Tensor], trial: Trial, output: Tensor, target: Tensor
) -> Tensor:
    return loss_fn(output, target)
