"""What a proof says of one case and of each tensor: frozen values that know whether they hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shardproof.prover.case import Check
from shardproof.prover.runs import Counts

FAR, NEAR = 1e-2, 1e-4  # relative L2 errors against fp64


@dataclass(frozen=True)
class Agreement:
    """How a tensor compares with plain torch's, worst degree counted; None: there is no number."""

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
class TensorReport:
    """One tensor at all degrees.

    Attributes:
        name, shape, dtype: of the full tensor.
        sha256: degree -> hash of the full tensor's bytes.
        identical: recorded at every degree, with one hash, and the same on all ranks that hold it.
        agreement_judged: must agree with plain torch (later steps need not).
        torch: the agreement; None if not judged.
        fp64: the errors; None if not judged.
        seed_allclose: meets the seed's elementwise tolerance; None if it need not.
        findings: what else is wrong, in words ("replicas differ at degree 2").
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

    @property
    def agrees(self) -> bool:
        """True if it agrees with plain torch as far as it must."""
        if not self.agreement_judged:
            return True
        if self.torch is None or self.is_far_off:
            return False
        return self.torch.allclose and self.seed_allclose is not False

    @property
    def is_far_off(self) -> bool:
        """True if the fp64 run shows a fault that the tolerance is too wide for.

        Within `atol` any tensor of small values agrees, one that is twice too large too. Here plain
        torch is near the fp64 run, and we are not: that is no rounding.
        """
        if self.fp64 is None or self.fp64.ours is None or self.fp64.torch is None:
            return False
        return self.fp64.ours > FAR and self.fp64.torch < NEAR

    def faults(self) -> list[str]:
        """What is wrong with it, a sentence each; none if it is as it must be."""
        found = []
        if not self.identical:
            hashes = ", ".join(f"{degree} {sha[:8]}" for degree, sha in self.sha256.items())
            found.append(f"{self.name}: the bits differ (degree and hash: {hashes})")
        if not self.agrees:
            apart = self.torch.max_abs_diff if self.torch is not None else None
            size = "" if apart is None else f" (largest difference {apart:.3g})"
            found.append(f"{self.name}: does not agree with plain PyTorch{size}")
        return found + [f"{self.name}: {finding}" for finding in self.findings]

    def differing_degrees(self) -> tuple[str, str] | None:
        """The first degree, and the first after it at which the hash is another one."""
        first, *others = self.sha256 or ("",)
        for degree in others:
            if self.sha256[degree] != self.sha256[first]:
                return first, degree
        return None


@dataclass(frozen=True)
class MemoryReport:
    """The largest storage one rank allocated, and what it may be."""

    rank: int
    largest_bytes: int
    largest_shape: tuple[int, ...]
    bound_bytes: int

    @property
    def is_within(self) -> bool:
        """True if the rank stayed within its bound."""
        return self.largest_bytes <= self.bound_bytes


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
        curves: run -> degree -> the loss of each step, of rank 0.
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

    @property
    def losses(self) -> tuple[float, ...]:
        """Of every step of the first training at the lowest degree; empty if none was followed."""
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
        return all(
            rank.is_within for degree, ranks in self.memory.items() if int(degree) >= 2
            for rank in ranks
        )  # fmt: skip

    @property
    def checks_passed(self) -> bool:
        """True if every claim of the case's own holds."""
        return all(check.passed for check in self.checks)

    @property
    def proved(self) -> bool:
        """True if all four hold, and of something: what recorded nothing shows nothing."""
        return (
            bool(self.tensors)
            and self.identical
            and self.agrees_with_torch
            and self.within_memory_bound
            and self.checks_passed
        )

    def first_difference(self) -> dict[str, Any] | None:
        """The first tensor, in execution order, that is not as it must be."""
        for tensor in self.tensors:
            if not tensor.identical:
                between = tensor.differing_degrees()
                return {
                    "tensor": tensor.name,
                    "what": "bits",
                    "degrees": [int(degree) for degree in between or ()],
                    "detail": "; ".join(tensor.findings),
                }
        for tensor in self.tensors:
            if not tensor.agrees:
                return {
                    "tensor": tensor.name,
                    "what": "torch",
                    "degrees": [],
                    "detail": "; ".join(tensor.findings),
                }
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "source": self.source,
            "description": self.description,
            "degrees": list(self.degrees),
            "proved": self.proved,
            "identical": self.identical,
            "agrees_with_torch": self.agrees_with_torch,
            "within_memory_bound": self.within_memory_bound,
            "seconds": self.seconds,
            "first_difference": self.first_difference(),
            "tensors": [
                plain(asdict(tensor)) | {"agrees": tensor.agrees} for tensor in self.tensors
            ],
            "memory": {
                degree: [plain(asdict(rank)) for rank in ranks]
                for degree, ranks in self.memory.items()
            },
            "comm": plain(self.comm),
            "checks": [asdict(check) for check in self.checks],
            "losses": list(self.losses),
            "curves": plain(self.curves),
        }


def plain(value: Any) -> Any:
    """Tuples to lists and mappings to dicts, all the way down."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
