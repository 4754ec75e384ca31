"""What a proof reports of one case and of each tensor, and whether that is a proof."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shardproof.prover.case import Check
from shardproof.prover.compare import FAR, NEAR, TIMES, Rounding
from shardproof.prover.fault_location import FaultLocation
from shardproof.prover.recording import Counts

Numbers = tuple[Any, ...] | float | int | bool  # nested as the tensor is


@dataclass(frozen=True)
class Agreement:
    """How a tensor compares with plain torch's at the worst degree; None: there is no number."""

    exact: bool
    allclose: bool
    rtol: float
    atol: float
    max_abs_diff: float | None
    max_ulp: int | None


@dataclass(frozen=True)
class Errors:
    """Relative L2 error against the fp64 run; None: there is no number."""

    ours: float | None
    torch: float | None


@dataclass(frozen=True)
class ShownValues:
    """The values of one tensor, as a report shows them.

    Attributes:
        held: degree -> the shape that each rank holds.
        ours, torch: the values; None if the tensor is large, or if that side has none.
        degree: whose ranks computed `ours`: 2 if that was run, else the lowest.
    """

    held: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    ours: Numbers | None = None
    torch: Numbers | None = None
    degree: int = 1


@dataclass(frozen=True)
class TensorReport:
    """One tensor at all degrees.

    Attributes:
        name, shape, dtype: of the full tensor.
        sha256: degree -> hash of the full tensor's bytes.
        identical: recorded at every degree with the same hash, and the same on all ranks that
            hold it.
        agreement_judged: it must agree with plain torch; tensors of later steps need not.
        torch: the agreement; None if not judged.
        fp64: the errors; None if not judged.
        seed_allclose: it passes the notebook's elementwise `allclose`; None if it need not.
        findings: other faults, in words ("replicas differ at degree 2").
        rounding: how far rounding alone may put it; None if not judged.
        nonfinite: degree, "torch" or "fp64" -> number of elements that are not finite, if any.
        shown: what each rank holds, and the values, if the report is to show them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: Mapping[str, str]
    identical: bool
    agreement_judged: bool
    torch: Agreement | None
    fp64: Errors | None
    seed_allclose: bool | None = None
    findings: tuple[str, ...] = ()
    rounding: Rounding | None = None
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    shown: ShownValues | None = None

    @property
    def agrees(self) -> bool:
        """True if it agrees with plain torch, or need not."""
        if not self.agreement_judged:
            return True
        if self.torch is None or self.is_far_off or self.is_not_updated:
            return False
        is_close = self.torch.allclose or self.is_decided_by_rounding
        return is_close and self.seed_allclose is not False

    @property
    def is_decided_by_rounding(self) -> bool:
        """True if it exceeds the tolerance, and plain torch's own rounding explains that."""
        if self.torch is None or self.torch.allclose or self.torch.max_abs_diff is None:
            return False
        return self.rounding is not None and self.rounding.explains

    @property
    def is_not_updated(self) -> bool:
        """True if a weight's update is missing or wrong, however small it is."""
        return self.rounding is not None and (self.rounding.is_stuck or self.rounding.is_lost)

    @property
    def is_far_off(self) -> bool:
        """True if the fp64 run shows a fault that the tolerance does not.

        A tensor of small values agrees within `atol` even if it is twice too large. If plain torch
        is near the fp64 run and ours is not, the difference is not rounding. The same holds where
        all values are rounding (their true value is zero) and ours are many times larger.
        """
        if self.fp64 is None:
            return False
        ours, plain = self.fp64.ours, self.fp64.torch
        if self.rounding is not None and (self.rounding.times or 0.0) > TIMES:
            return ours is None or ours > FAR
        return ours is not None and plain is not None and ours > FAR and plain < NEAR

    def faults(self) -> list[str]:
        """Its faults, a sentence each; empty if there is none."""
        sentences = []
        if not self.identical:
            hashes = ", ".join(f"{degree} {sha[:8]}" for degree, sha in self.sha256.items())
            sentences.append(f"{self.name}: the bits differ (degree and hash: {hashes})")
        if not self.agrees:
            distance = self.torch.max_abs_diff if self.torch is not None else None
            size = "" if distance is None else f" (largest difference {distance:.3g})"
            sentences.append(f"{self.name}: does not agree with plain PyTorch{size}")
        return sentences + [f"{self.name}: {finding}" for finding in self.findings]

    @property
    def is_finite(self) -> bool:
        """True if neither ours nor plain torch's has NaN or Inf."""
        return not self.nonfinite

    def remark(self) -> str:
        """A remark on a tensor that agrees only because rounding decides it; "" for any other."""
        if not self.is_decided_by_rounding or self.torch is None or self.rounding is None:
            return ""
        ours, plain = self.rounding.ours or 0.0, self.rounding.torch or 0.0
        return (
            f"{self.name}: decided by rounding (largest difference {self.torch.max_abs_diff:.3g}; "
            f"from fp64 {ours:.3g}, plain PyTorch {plain:.3g})"
        )

    def differing_degrees(self) -> tuple[str, str] | None:
        """The first degree, and the first one after it that has a different hash."""
        first, *others = self.sha256 or ("",)
        for degree in others:
            if self.sha256[degree] != self.sha256[first]:
                return first, degree
        return None


@dataclass(frozen=True)
class MemoryReport:
    """The largest storage that one rank allocated, and its bound."""

    rank: int
    largest_bytes: int
    largest_shape: tuple[int, ...]
    bound_bytes: int

    @property
    def is_within(self) -> bool:
        """True if the rank stayed within its bound."""
        return self.largest_bytes <= self.bound_bytes


@dataclass(frozen=True)
class CutReport:
    """How much the ranks of one degree shared.

    Attributes:
        parameters: number of those that no rank owns whole.
        sent_bytes: forward and backward, of the rank that sent most.
    """

    parameters: int
    sent_bytes: int

    @property
    def is_cut(self) -> bool:
        """True if a parameter was cut and something was sent."""
        return self.parameters > 0 and self.sent_bytes > 0


@dataclass(frozen=True)
class CaseReport:
    """One case at all degrees.

    Attributes:
        name, source, description: of the case.
        degrees: that were run, lowest first.
        seconds: on the ranks, all degrees together.
        tensors: in execution order.
        memory: degree -> one entry for each rank.
        comm: degree -> direction -> collective -> figures.
        checks: the case's own claims.
        curves: name of a training -> degree -> the loss of each step, on rank 0.
        cut: degree -> how much its ranks shared.
        allows_nonfinite: NaN and Inf are no fault.
        where: module and operation in which the fault begins, if it was located.
    """

    name: str
    source: str
    description: str
    degrees: tuple[int, ...]
    seconds: float
    tensors: tuple[TensorReport, ...]
    memory: Mapping[str, tuple[MemoryReport, ...]]
    comm: Mapping[str, Counts]
    checks: tuple[Check, ...]
    curves: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    cut: Mapping[str, CutReport] = field(default_factory=dict)
    allows_nonfinite: bool = False
    where: FaultLocation | None = None

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses of the first training at the lowest degree; empty if none was followed."""
        by_degree = next(iter(self.curves.values()), {})
        return next(iter(by_degree.values()), ())

    @property
    def identical(self) -> bool:
        """True if every tensor has the same bits at every degree."""
        return all(tensor.identical for tensor in self.tensors)

    @property
    def agrees_with_torch(self) -> bool:
        """True if every tensor that is judged agrees with plain torch."""
        return all(tensor.agrees for tensor in self.tensors)

    @property
    def within_memory_bound(self) -> bool:
        """True if no rank exceeds its bound at degree 2 or more."""
        return self.first_beyond_bound() is None

    def first_beyond_bound(self) -> tuple[int, MemoryReport] | None:
        """The first rank that exceeds its bound at degree 2 or more, and that degree."""
        for degree, ranks in self.memory.items():
            for rank in ranks:
                if int(degree) >= 2 and not rank.is_within:
                    return int(degree), rank
        return None

    @property
    def checks_passed(self) -> bool:
        """True if every claim of the case's own holds."""
        return all(check.passed for check in self.checks)

    @property
    def is_finite(self) -> bool:
        """True if no tensor has NaN or Inf, or if that was allowed."""
        return self.allows_nonfinite or all(tensor.is_finite for tensor in self.tensors)

    @property
    def uncut_degrees(self) -> tuple[int, ...]:
        """The degrees above 1 at which nothing was cut or nothing was sent."""
        return tuple(
            int(degree) for degree, cut in self.cut.items() if int(degree) > 1 and not cut.is_cut
        )

    @property
    def proved(self) -> bool:
        """True if all conditions hold, some tensor was recorded, and every degree above 1 cut."""
        return (
            bool(self.tensors)
            and self.identical
            and self.agrees_with_torch
            and self.within_memory_bound
            and self.checks_passed
            and self.is_finite
            and not self.uncut_degrees
        )

    def first_difference(self) -> dict[str, Any] | None:
        """The first tensor in execution order with a fault: of bits, else agreement, else NaN."""
        faults: list[tuple[TensorReport, str, Sequence[str], Sequence[str]]] = []
        for tensor in self.tensors:
            if not tensor.identical:
                faults.append((tensor, "bits", tensor.differing_degrees() or (), tensor.findings))
        faults += [(each, "torch", (), each.findings) for each in self.tensors if not each.agrees]
        for tensor in () if self.is_finite else self.tensors:
            if not tensor.is_finite:
                where = [degree for degree in tensor.nonfinite if degree.isdigit()]
                faults.append((tensor, "not finite", where, ()))
        if not faults:
            return None
        tensor, what, degrees, findings = faults[0]
        return {
            "tensor": tensor.name,
            "what": what,
            "degrees": [int(degree) for degree in degrees],
            "detail": "; ".join(findings),
        }

    def as_dict(self) -> dict[str, Any]:
        """The JSON data of this case."""
        return {
            "name": self.name,
            "source": self.source,
            "description": self.description,
            "degrees": list(self.degrees),
            "proved": self.proved,
            "identical": self.identical,
            "agrees_with_torch": self.agrees_with_torch,
            "within_memory_bound": self.within_memory_bound,
            "is_finite": self.is_finite,
            "allows_nonfinite": self.allows_nonfinite,
            "cut": {degree: asdict(cut) for degree, cut in self.cut.items()},
            "uncut_degrees": list(self.uncut_degrees),
            "seconds": self.seconds,
            "first_difference": self.first_difference(),
            "where": None if self.where is None else asdict(self.where),
            "tensors": [
                plain(asdict(tensor))
                | {
                    "agrees": tensor.agrees,
                    "decided_by_rounding": tensor.is_decided_by_rounding,
                }
                for tensor in self.tensors
            ],
            "memory": {
                degree: [plain(asdict(rank)) for rank in ranks]
                for degree, ranks in self.memory.items()
            },
            "comm": plain(self.comm),
            "checks": [asdict(check) for check in self.checks],
            "losses": plain(self.losses),
            "curves": plain(self.curves),
        }


def plain(value: Any) -> Any:
    """JSON data: lists for tuples, dicts for mappings, and None for NaN and Inf."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
