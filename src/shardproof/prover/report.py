"""What a proof says: the report over all cases, as a sentence and as plain data.

`Report.as_dict` is the JSON document of `shardproof prove --json`; its keys and nesting are
stable. Keys may be added, never renamed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardproof.prover.casereport import CaseReport
from shardproof.prover.verdict import counted, verdict

_REFERENCE = (
    "The reference ran in plain PyTorch before the ranks, outside of them, and is exempt from the "
    "memory rule."
)
_AUDIT = (
    "The memory audit covers {phases}; the recorder's own work (hashing and comparing, in blocks "
    "of at most a rank's share) is outside of it."
)
_NO_CREATION = "The memory audit leaves creation out, as it was asked to."


@dataclass(frozen=True)
class Report:
    """What was shown, of which cases, and under which contract.

    Attributes:
        cases: what was run.
        degrees: that were run, lowest first.
        engine: what the ranks were: "threads", "processes", "torchrun".
        transport: what carried their bytes at the highest degree.
        transport_note: why processes did not share memory; empty if there is nothing to say.
        numerics, leaves, seed: of the scheme.
        contract: everything the bits depend on.
        skipped: cases that lack their extra: name and extra.
        audits_creation: the memory audit covers the making of every model.
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

    @property
    def proved(self) -> bool:
        """True if every case is proved."""
        return all(case.proved for case in self.cases)

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
        """What was proved, or the first thing that keeps it from being so, without notes."""
        return verdict(self.cases, self.degrees)

    def verdict(self) -> str:
        """The answer in plain words, and what was left out of the proof, as it was asked to."""
        return self.answer if self.audits_creation else f"{self.answer} {_NO_CREATION}"

    def __str__(self) -> str:
        """A line for each case, one for each tensor that is not as it must be, and the verdict."""
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
        """What a reader must know of how it was measured."""
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
        }
