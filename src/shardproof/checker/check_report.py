"""`CheckReport`: whether a program is right; if not, where the first fault is, and what it is."""

from dataclasses import dataclass
from typing import Any

from shardproof.checker.mistake_kinds import KINDS
from shardproof.wording import spelt_out


@dataclass(frozen=True)
class CheckedTensor:
    """One tensor of the program beside that of the plain module.

    Attributes:
        name: of the tensor.
        module: path of the module that it belongs to.
        step: number of the step, from 1; one more after the last update.
        placement: how the ranks' tensors lie in the whole one.
        in_fp32: the largest difference, relative to the largest element; None if not compared.
        in_fp64: the same in fp64; None if the program does not run in fp64.
        verdict: "same", "rounding" or "wrong"; "inside" if it is another tensor than the plain
            module's, and the output of a module around it is right.
    """

    name: str
    module: str
    step: int
    placement: str
    in_fp32: float | None
    in_fp64: float | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """The tensor as plain data."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class CheckedLayout:
    """How a parameter of the program lies on the ranks.

    Attributes:
        name: of the parameter.
        whole: the parameter of the plain module that it is a part of.
        shape: of the whole parameter.
        placement: how it lies, as it was found.
        declared: how it lies, as the program says; empty if it says nothing.
        held: the indices of each rank along the dims that are cut.
    """

    name: str
    whole: str
    shape: tuple[int, ...]
    placement: str
    declared: str
    held: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The layout as plain data."""
        return {**self.__dict__, "shape": list(self.shape), "held": list(self.held)}


@dataclass(frozen=True)
class FirstDifference:
    """The first element of a tensor that differs.

    Attributes:
        tensor: name of the tensor.
        rank: the rank that holds the element.
        index: of the element in the rank's tensor.
        value: of the program.
        expected: of the plain module.
    """

    tensor: str
    rank: int
    index: tuple[int, ...]
    value: float
    expected: float

    def as_dict(self) -> dict[str, Any]:
        """The element as plain data."""
        return {**self.__dict__, "index": list(self.index)}


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        right: whether the program agrees with the plain module up to rounding.
        verdict: a sentence that says so, or what is wrong and where.
        module: path of the first faulty module, "" for the whole model or its loss; None if right.
        kind: of the mistake, one of `KINDS`; None if right, or if no known mistake fits.
        evidence: what the kind was compared with, and what remains unexplained.
        phase: where in the step the fault is first seen; "" if right.
        source: file and line of the forward of the module; "" if not known.
        degree: number of ranks.
        precision: "fp32 and fp64", or "fp32 and moved last bits".
        note: why fp64 was not used; "" if it was.
        tensors: everything that was compared, in order.
        layouts: how the parameters lie.
        differences: the first elements that differ, at most two.
        modules: path and class of every module of the plain one, in order.
    """

    right: bool
    verdict: str
    module: str | None
    kind: str | None
    evidence: str
    phase: str
    source: str
    degree: int
    precision: str
    note: str
    tensors: tuple[CheckedTensor, ...]
    layouts: tuple[CheckedLayout, ...]
    differences: tuple[FirstDifference, ...]
    modules: tuple[tuple[str, str], ...]

    @property
    def meaning(self) -> str:
        """What the kind means; empty without one."""
        return KINDS[self.kind][0] if self.kind else ""

    @property
    def way_out(self) -> str:
        """What to do about the kind; empty without one."""
        return KINDS[self.kind][1] if self.kind else ""

    def marks(self) -> dict[str, str]:
        """For each module with a tensor that was compared, the worst verdict on its tensors."""
        worst: dict[str, str] = {}
        order = ("same", "rounding", "inside", "wrong")
        for each in self.tensors:
            before = worst.get(each.module, "same")
            worst[each.module] = max(before, each.verdict, key=order.index)
        return worst

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return spelt_out(
            {
                "right": self.right,
                "verdict": self.verdict,
                "module": self.module,
                "kind": self.kind,
                "evidence": self.evidence,
                "phase": self.phase,
                "source": self.source,
                "degree": self.degree,
                "precision": self.precision,
                "note": self.note,
                "tensors": [each.as_dict() for each in self.tensors],
                "layouts": [each.as_dict() for each in self.layouts],
                "differences": [each.as_dict() for each in self.differences],
            }
        )
