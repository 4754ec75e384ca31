"""What a proof says of all cases: the report, its JSON data, and its verdict as a sentence.

`Report.as_dict` is the JSON document of `shardproof prove --json`. Its keys and nesting are stable:
keys may be added, never renamed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardproof.prover.case_report import CaseReport, TensorReport
from shardproof.prover.compare import NEAR
from shardproof.prover.resuming import ResumeReport

_REFERENCE = (
    "The reference ran in plain PyTorch before the ranks, outside of them, and is exempt from the "
    "memory rule."
)
_AUDIT = (
    "The memory audit covers {phases}; the recorder's own work (hashing and comparing, in blocks "
    "of at most a rank's share) is outside of it."
)
_NO_CREATION = "The memory audit leaves creation out, as requested."


@dataclass(frozen=True)
class Report:
    """The outcome of a proof: of which cases, on what ranks, and under which contract.

    Attributes:
        cases: one report for each.
        degrees: that were run, lowest first.
        engine: what the ranks were: "threads", "processes", "torchrun".
        transport: what carried bytes between the ranks of the highest degree.
        transport_note: why processes did not share memory; empty if there is nothing to say.
        resumed: one for each case that was saved and resumed.
        numerics, leaves, seed: of the scheme.
        contract: everything that the bits depend on.
        skipped: cases whose extra is not installed: name and extra.
        audits_creation: the memory audit covers the construction of every model.
    """

    cases: tuple[CaseReport, ...]
    degrees: tuple[int, ...]
    engine: str
    transport: str
    numerics: str
    leaves: int
    seed: int
    contract: str
    skipped: tuple[Mapping[str, str], ...] = ()
    audits_creation: bool = True
    transport_note: str = ""
    resumed: tuple[ResumeReport, ...] = ()

    @property
    def proved(self) -> bool:
        """True if every case is proved, also when it was saved and resumed."""
        return all(case.proved for case in self.cases) and not self._resume_fault()

    @property
    def identical(self) -> bool:
        """True if every tensor of every case has the same bits at every degree."""
        return all(case.identical for case in self.cases)

    @property
    def agrees_with_torch(self) -> bool:
        """True if every judged tensor of every case agrees with plain torch."""
        return all(case.agrees_with_torch for case in self.cases)

    @property
    def answer(self) -> str:
        """What was proved, or the first fault, without notes."""
        answer, fault = verdict(self.cases, self.degrees), self._resume_fault()
        if not self.resumed or not all(case.proved for case in self.cases):
            return answer
        if fault:
            return f"Not proved: {fault}."
        runs = sum(len(each.pairs) for each in self.resumed)
        return (
            f"{answer} Saved and resumed, {counted(runs, 'run')} had the bits of the unbroken run."
        )

    def _resume_fault(self) -> str:
        """The first case that was resumed with other bits, and how; "" if there is none."""
        return next((f"in case {r.case}, {r.fault}" for r in self.resumed if r.fault), "")

    def verdict(self) -> str:
        """The answer, and what the caller left out of the proof."""
        return self.answer if self.audits_creation else f"{self.answer} {_NO_CREATION}"

    def __str__(self) -> str:
        """A line for each case, one for each fault and remark of a tensor, and the verdict."""
        lines = []
        for case in self.cases:
            at = f"degree{'s' if len(case.degrees) > 1 else ''} {', '.join(map(str, case.degrees))}"
            answer = "proved" if case.proved else "NOT PROVED"
            tensors = counted(len(case.tensors), "tensor")
            lines.append(f"{case.name}: {answer}, {tensors}, {at}")
            for tensor in case.tensors:
                lines += [f"  {line}" for line in [*tensor.faults(), tensor.remark()] if line]
            lines += [] if case.where is None else [f"  where: {case.where}"]
        if self.transport_note:
            lines.append(f"transport: {self.transport}, {self.transport_note}")
        return "\n".join([*lines, f"contract: {self.contract}", self.verdict()])

    def __repr__(self) -> str:
        return f"<Report: {self.verdict()}>"

    def notes(self) -> tuple[str, ...]:
        """How it was measured, as sentences."""
        creation = "creation, " if self.audits_creation else ""
        return _REFERENCE, _AUDIT.format(phases=f"{creation}forward, backward and update")

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "proved": self.proved,
            "identical": self.identical,
            "agrees_with_torch": self.agrees_with_torch,
            "numerics": self.numerics,
            "engine": self.engine,
            "transport": self.transport,
            "transport_note": self.transport_note,
            "leaves": self.leaves,
            "contract": self.contract,
            "skipped": [dict(case) for case in self.skipped],
            "seed": self.seed,
            "degrees": list(self.degrees),
            "notes": list(self.notes()),
            "cases": [case.as_dict() for case in self.cases],
            **({"resumed": [each.as_dict() for each in self.resumed]} if self.resumed else {}),
        }


def verdict(cases: Sequence[CaseReport], degrees: Sequence[int]) -> str:
    """What was proved, or the first fault that prevents a proof, as one sentence."""
    for case in cases:
        if not case.proved:
            where = "" if case.where is None else f" {case.where}"
            return f"Not proved: in case {case.name}, {_first_fault(case)}.{where}"
    what = f"{counted(len(cases), 'case')} with {counted(_count(cases), 'tensor')}"
    rest = "agrees with plain PyTorch and no rank exceeds its memory bound"
    if len(degrees) == 1:
        sentence = (
            f"Proved for {what}: every tensor {rest} at degree {degrees[0]}; with one "
            f"degree nothing was compared between degrees."
        )
    else:
        same = f"has the same bits at degrees {_listed(degrees)}"
        sentence = f"Proved for {what}: every tensor {same}, {rest}."
    return " ".join([sentence, *_reservations(cases)])


def _count(cases: Sequence[CaseReport]) -> int:
    return sum(len(case.tensors) for case in cases)


def _reservations(cases: Sequence[CaseReport]) -> Iterator[str]:
    """Sentences on tensors that rounding decides, and on NaN and Inf that were allowed."""
    tensors = [tensor for case in cases for tensor in case.tensors]
    by_rounding = [tensor.name for tensor in tensors if tensor.is_decided_by_rounding]
    if by_rounding:
        yield f"In {_named(by_rounding)} rounding decides some numbers, in plain PyTorch as here."
    nonfinite = [tensor.name for tensor in tensors if not tensor.is_finite]
    if nonfinite:
        yield f"NaN or Inf were allowed, and occur in {_named(nonfinite)}."


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors (the first is {names[0]})"


def _first_fault(case: CaseReport) -> str:
    """The first fault of bits, of agreement, memory, checks, cuts; NaN and Inf in their place."""
    if not case.tensors:
        return "no tensor was recorded, so that nothing was compared"
    faults = [_bits_fault(tensor) for tensor in case.tensors if not tensor.identical][:1]
    faults += [_agreement_fault(tensor) for tensor in case.tensors if not tensor.agrees][:1]
    if not case.is_finite:
        faults.insert(_place_of_nonfinite(case), _nonfinite_fault(case))
    uncut = [_uncut_fault(case)] if case.uncut_degrees else []
    if faults:
        return "; ".join([*faults, *uncut])
    beyond = case.first_beyond_bound()
    if beyond is not None:
        degree, rank = beyond
        return (
            f"rank {rank.rank} of {degree} allocated {rank.largest_bytes} bytes for a tensor of "
            f"shape {list(rank.largest_shape)}, more than its bound of {rank.bound_bytes}"
        )
    for check in case.checks:
        if not check.passed:
            return f"the check {check.name!r} failed ({check.detail})"
    return uncut[0]


def _place_of_nonfinite(case: CaseReport) -> int:
    """0 if NaN or Inf come before any other fault of a tensor, else 2: after those faults."""
    for tensor in case.tensors:
        if not tensor.is_finite:
            return 0
        if not (tensor.identical and tensor.agrees):
            return 2
    return 0


def _nonfinite_fault(case: CaseReport) -> str:
    tensor = next(tensor for tensor in case.tensors if not tensor.is_finite)
    numel, counts = math.prod(tensor.shape), tensor.nonfinite
    ranks = {degree: count for degree, count in counts.items() if degree.isdigit()}
    clauses = []
    if ranks:
        at = "" if set(ranks) == set(map(str, case.degrees)) else f" at degree {_listed([*ranks])}"
        clauses.append(f"{max(ranks.values())} of {numel} are NaN or infinite{at}")
    if "torch" in counts:
        count = f"{counts['torch']} of {numel} are NaN or infinite in plain PyTorch"
        clauses.append("in plain PyTorch too" if ranks else count)
    elif ranks and tensor.torch is not None:
        clauses.append("in plain PyTorch all are finite")
    if set(counts) == {"fp64"}:
        clauses.append(f"{counts['fp64']} of {numel} are NaN or infinite in the fp64 run")
    return (
        f"tensor {tensor.name} is the first whose numbers are not all finite "
        f"({', '.join(clauses)}), and such numbers show nothing: mend them, or allow them with "
        "allow_nonfinite=True (--allow-nonfinite)"
    )


def _uncut_fault(case: CaseReport) -> str:
    degree = case.uncut_degrees[0]
    cut = case.cut[str(degree)]
    if cut.parameters:
        what = (
            f"{counted(cut.parameters, 'parameter')} were cut at degree {degree}, but no byte was "
            "sent in forward or backward"
        )
    else:
        sent = f", though {cut.sent_bytes} bytes were sent" if cut.sent_bytes else ""
        what = f"no parameter was cut at degree {degree}{sent}"
    return (
        f"{what}, so that nothing was shown of that degree. Cut the model over the axis that build "
        "is given, with layers or a plan of shardproof"
    )


def _bits_fault(tensor: TensorReport) -> str:
    between = tensor.differing_degrees()
    if between is not None:
        what = (
            f"tensor {tensor.name} is the first whose bits differ: degree {between[1]} differs "
            f"from degree {between[0]}"
        )
    else:
        what = f"tensor {tensor.name} is the first that is not identical"
    return f"{what} ({'; '.join(tensor.findings)})" if tensor.findings else what


def _agreement_fault(tensor: TensorReport) -> str:
    head = f"tensor {tensor.name} is the first that does not agree with plain PyTorch"
    if tensor.torch is None:
        return f"{head} ({'; '.join(tensor.findings)})"
    if tensor.torch.max_abs_diff is None:
        return f"{head}: NaN or Inf stand in other places"
    if tensor.torch.allclose and tensor.is_far_off:
        return (
            f"{head}: its values are too small for the tolerance (atol {tensor.torch.atol:g}), and "
            f"its error against fp64 is {_far(tensor)}"
        )
    is_within = tensor.torch.allclose or tensor.is_decided_by_rounding
    if tensor.is_not_updated and is_within:
        return f"{head}: {_update_fault(tensor)}"
    if tensor.torch.allclose:
        return f"{head} element by element, as its teaching notebook demands (atol=1e-6)"
    sentence = (
        f"{head}: the largest difference is {tensor.torch.max_abs_diff:.3g} "
        f"(rtol {tensor.torch.rtol:g}, atol {tensor.torch.atol:g})"
    )
    if tensor.rounding is not None and tensor.rounding.outside is not None:
        sentence += f", and rounding explains all but {tensor.rounding.outside:.3g} of it"
    return sentence


def _far(tensor: TensorReport) -> str:
    """How far it is from fp64, by the measure that it fails."""
    ours, plain = (tensor.fp64.ours, tensor.fp64.torch) if tensor.fp64 else (None, None)
    if ours is not None and plain is not None and plain < NEAR:
        return f"{ours:.2g}, plain PyTorch's {plain:.2g}"
    times = tensor.rounding.times if tensor.rounding else None
    return f"{times or 0.0:.3g} times plain PyTorch's, which is rounding"


def _update_fault(tensor: TensorReport) -> str:
    if tensor.rounding is None or tensor.rounding.is_stuck:
        return "it has a gradient and was not updated, plain PyTorch's was"
    return (
        f"its update is wrong by {tensor.rounding.update_ours:.2g} of itself, plain PyTorch's by "
        f"{tensor.rounding.update_torch or 0.0:.2g}"
    )


def counted(number: int, noun: str) -> str:
    """The number and the noun, in singular or plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(degrees: Sequence[int | str]) -> str:
    *front, last = map(str, degrees)
    return f"{', '.join(front)} and {last}" if front else last
