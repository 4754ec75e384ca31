"""A mistake: the lines that are changed, the training that runs them, and the expected finding."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from shardproof.mistakes.edit import Edit, planted
from shardproof.prover.case import Case, CaseRun

BITS, TORCH, MEMORY = "bits", "torch", "memory"


@dataclass(frozen=True)
class SetUp:
    """A small training in which mistakes are made.

    Attributes:
        name: the name of its case.
        description: what is trained, in a line.
        work: makes the run of a case that has so many steps.
    """

    name: str
    description: str
    work: Callable[[int], Callable[[CaseRun], None]]

    def case(self, steps: int = 1) -> Case:
        """The case for the prover."""
        return Case(self.name, self.description, self.work(steps))


@dataclass(frozen=True)
class Finding:
    """What the prover must say of a mistake.

    Attributes:
        tensor: the first that it names; of MEMORY, the shape that was too large.
        what: BITS: its bits depend on the degree, or ranks hold different copies. TORCH: every
            degree has the same bits, and plain PyTorch has other numbers. MEMORY: a rank held too
            much, and no number is wrong.
        degrees: the two whose bits differ; none if BITS shows in the copies alone.
        says: what else it says of the tensor, such as that replicas differ; "": nothing.
        agrees: every number is as near to plain PyTorch as rounding allows.
    """

    tensor: str
    what: str = BITS
    degrees: tuple[int, ...] = (1, 2)
    says: str = ""
    agrees: bool = False


@dataclass(frozen=True)
class Mistake:
    """One mistake that people make.

    Attributes:
        name: on the command line.
        title: what was done, as a sentence.
        edit: the lines that were changed.
        setup: the training that shows it.
        why: what goes wrong and why, in a few plain sentences.
        finding: what the prover must say.
        degrees: at which it is run.
        hidden_at: degrees at which nothing shows, and the prover proves the mistake.
        sighting: where it was made, such as a pull request that mended it; "": no place is known.
        stops: outside of the prover, shardproof itself raises an error: inputs differ.
    """

    name: str
    title: str
    edit: Edit
    setup: SetUp
    why: str
    finding: Finding
    degrees: tuple[int, ...] = (1, 2)
    hidden_at: tuple[int, ...] = ()
    sighting: str = ""
    stops: bool = False

    def planted(self) -> AbstractContextManager[None]:
        """Plant the mistake in this process inside the block; ranks must be threads."""
        return planted([self.edit])

    def as_dict(self) -> Mapping[str, Any]:
        """The description of the mistake, as plain data."""
        return {
            "name": self.name,
            "title": self.title,
            "file": self.edit.file,
            "line": self.edit.line,
            "function": self.edit.plain.__qualname__,
            "right": self.edit.right,
            "wrong": self.edit.wrong,
            "case": self.setup.name,
            "description": self.setup.description,
            "why": self.why,
            "seen": self.sighting,
            "degrees": list(self.degrees),
            "hidden_at": list(self.hidden_at),
        }
