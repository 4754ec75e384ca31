"""What a proof says: the report over all cases, as a sentence and as plain data.

`Report.as_dict` is the JSON document of `shardproof prove --json`; its keys and nesting are
stable. Keys may be added, never renamed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardproof.prover.casereport import CaseReport
from shardproof.prover.verdict import verdict

NOTES = (
    "The reference ran in plain PyTorch before the ranks, outside of them, and is exempt from the "
    "memory rule.",
    "The memory audit covers creation, forward, backward and update; the recorder's own work "
    "(hashing and comparing, in blocks of at most a rank's share) is outside of it.",
)


@dataclass(frozen=True)
class Report:
    """What was shown, of which cases, and under which contract.

    Attributes:
        cases: what was run.
        degrees: that were run, lowest first.
        engine: what the ranks were: "threads", "processes", "torchrun".
        transport: what carried their bytes at the highest degree.
        numerics, leaves, seed: of the scheme.
        contract: everything the bits depend on.
        skipped: cases that lack their extra: name and extra.
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

    def verdict(self) -> str:
        """One plain sentence: what was proved, or the first thing that keeps it from being so."""
        return verdict(self.cases, self.degrees)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "proved": self.proved,
            "identical": self.identical,
            "agrees_with_torch": self.agrees_with_torch,
            "numerics": self.numerics,
            "engine": self.engine,
            "transport": self.transport,
            "leaves": self.leaves,
            "contract": self.contract,
            "skipped": [dict(case) for case in self.skipped],
            "seed": self.seed,
            "degrees": list(self.degrees),
            "notes": list(NOTES),
            "cases": [case.as_dict() for case in self.cases],
        }
