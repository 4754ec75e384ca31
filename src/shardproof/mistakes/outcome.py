"""The effects of one mistake: the report of the prover, and the losses beside the right ones."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shardproof.axis import Axis
from shardproof.errors import ShardproofError
from shardproof.leaves import Layout
from shardproof.mistakes.mistake import BITS, MEMORY, Finding, Mistake, SetUp
from shardproof.prover.case import CaseRun, RecordOptions
from shardproof.prover.case_report import CaseReport, TensorReport
from shardproof.prover.proof import DEFAULT_SEED, prove_cases
from shardproof.prover.report import Report
from shardproof.ranks import launch
from shardproof.scheme import Scheme

STEPS = 16  # of a loss curve


@dataclass(frozen=True)
class Outcome:
    """The effects of one mistake.

    Attributes:
        mistake: which.
        degrees: at which it was made.
        report: of the prover; None if a rank raised an error.
        error: what was raised then, or "".
        right: the loss of each step without the mistake.
        wrong: with it, on rank 0 of the highest degree; fewer steps if a rank raised an error.
        stopped: outside of the prover, the error with which the ranks stop at that degree, or "".
    """

    mistake: Mistake
    degrees: tuple[int, ...]
    report: Report | None
    error: str
    right: tuple[float, ...]
    wrong: tuple[float, ...]
    stopped: str

    @property
    def case(self) -> CaseReport | None:
        """What the prover says of the one case."""
        return self.report.cases[0] if self.report is not None else None

    @property
    def verdict(self) -> str:
        """The prover's sentence, without its notes; or the error."""
        return self.error if self.report is None else self.report.answer

    @property
    def first(self) -> TensorReport | None:
        """The first tensor that is not as it must be; None if no number is wrong."""
        difference = self.case.first_difference() if self.case is not None else None
        if self.case is None or difference is None:
            return None
        return next(each for each in self.case.tensors if each.name == difference["tensor"])

    @property
    def apart(self) -> float | None:
        """How far the first tensor is from plain PyTorch's, at most; None if none is compared."""
        if self.first is None or self.first.torch is None:
            return None
        return self.first.torch.max_abs_diff

    @property
    def difference(self) -> str:
        """The first tensor that is not as it must be, and by how much, in words."""
        if self.report is None:
            return "none was compared, for a rank raised an error"
        if self.first is None:
            is_memory = self.mistake.finding.what == MEMORY and not self.report.proved
            return "none; a rank allocates too much memory" if is_memory else "none"
        if self.apart is None:
            return f"{self.first.name}, which plain PyTorch draws otherwise"
        if self.first.agrees:
            by = "by no more than rounding" if self.apart else "on other ranks than rank 0"
            return f"{self.first.name}, {by}"
        return f"{self.first.name}, by up to {amount(self.apart)}"

    @property
    def is_named(self) -> bool:
        """True if the prover says of the mistake what the gallery says that it does."""
        if self.report is None:
            return False
        is_own = self.degrees == self.mistake.degrees
        return is_found(self.report, self.mistake.finding, in_full=is_own)


def amount(number: float) -> str:
    """A loss or a difference in a few characters.

    >>> amount(0.44753), amount(42039.7), amount(float("nan"))
    ('0.448', '42040', 'nan')
    """
    return f"{number:.0f}" if 1000 <= abs(number) < 1e7 else f"{number:.3g}"


def is_found(report: Report, finding: Finding, *, in_full: bool = True) -> bool:
    """True if a report has the finding.

    Args:
        report: of one case.
        finding: what it must say.
        in_full: at the degrees that the finding is of; at others, only the tensor and what is
            wrong with it.
    """
    case = report.cases[0]
    difference = case.first_difference()
    if finding.what == MEMORY:
        beyond = case.first_beyond_bound()
        if beyond is None or difference is not None:
            return False
        return str(list(beyond[1].largest_shape)) == finding.tensor
    if difference is None or (difference["tensor"], difference["what"]) != (
        finding.tensor,
        finding.what,
    ):
        return False
    if not in_full:
        return True
    detail = difference["detail"]
    is_told = finding.says in detail if finding.says else not detail
    is_between = tuple(difference["degrees"]) == finding.degrees
    return is_told and is_between and case.agrees_with_torch == finding.agrees


def make(mistake: Mistake, degrees: Sequence[int] = (), *, steps: int = STEPS) -> Outcome:
    """Run a mistake on ranks that are threads; nothing else may run in this process meanwhile.

    Args:
        mistake: which.
        degrees: how many ranks, rising; by default those at which it shows.
        steps: of the loss curves.
    Returns:
        What came of it, at these degrees; also at degree 1 if they are one higher degree and the
        mistake shows in bits that differ between degrees.
    """
    at_degrees = tuple(degrees) or mistake.degrees
    finding = mistake.finding
    if len(at_degrees) == 1 and at_degrees[0] > 1 and finding.what == BITS and finding.degrees:
        at_degrees = (1, *at_degrees)
    right = _right(mistake.setup, steps)
    report, error, stopped = None, "", ""
    wrong: tuple[float, ...] = ()
    with mistake.planted():
        try:
            report = prove_cases([mistake.setup.case()], degrees=at_degrees)
            wrong = losses(mistake.setup, at_degrees[-1], steps)
        except ShardproofError as raised:
            error = _sentence(raised)
        try:
            losses(mistake.setup, at_degrees[-1], 1, compare_inputs=True)
        except ShardproofError as raised:
            stopped = _sentence(raised)
    return Outcome(mistake, at_degrees, report, error, right, wrong, stopped)


def losses(
    setup: SetUp, degree: int, steps: int, *, compare_inputs: bool = False
) -> tuple[float, ...]:
    """The loss of every step of a set-up, on rank 0.

    Args:
        setup: what is trained.
        degree: how many ranks.
        steps: how many.
        compare_inputs: as of `launch`.
    """

    def work(axis: Axis) -> tuple[float, ...]:
        run = CaseRun(axis=axis, scheme=Scheme(), seed=DEFAULT_SEED, recorder=_Nobody())
        setup.work(steps)(run)
        return tuple(run.curves[""])

    return launch(work, degree=degree, compare_inputs=compare_inputs)[0]


@functools.cache  # many mistakes have one set-up
def _right(setup: SetUp, steps: int) -> tuple[float, ...]:
    return losses(setup, 1, steps)


def _sentence(error: ShardproofError) -> str:
    """An error as one line, without the traceback of a rank."""
    return " ".join(str(error).split("\n\n")[0].split())


class _Nobody:
    """A recorder that keeps nothing."""

    def record(self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions) -> None:
        """Nothing."""

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Nothing."""
