"""What a plan fixes and the degree may not change: leaves, numerics and seed."""

from dataclasses import dataclass
from typing import Literal

from shardproof.errors import DegreeError, UsageError
from shardproof.leaves import DEFAULT_LEAVES

Numerics = Literal["invariant", "native"]
NUMERICS: tuple[Numerics, ...] = ("invariant", "native")


@dataclass(frozen=True)
class Scheme:
    """How the sums of a model are cut, the same at every degree.

    Attributes:
        leaves: into how many leaves a cut dim is divided; the highest possible degree.
        numerics: "invariant" for the same bits at every degree, "native" for one product per
            shard and the transport's own all-reduce.
        seed: of everything that is drawn (initialisation).
    """

    leaves: int = DEFAULT_LEAVES
    numerics: Numerics = "invariant"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("leaves", "seed"):
            value = getattr(self, name)
            # A bool is an int, and never meant as one here.
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"{name}={value!r} is not a whole number. Give an int.")
        if self.leaves < 1:
            raise DegreeError(
                f"leaves={self.leaves} is not a positive number. Use 1 or more (default 8)."
            )
        if self.numerics not in NUMERICS:
            raise UsageError(
                f"unknown numerics {self.numerics!r}. Use one of: {', '.join(NUMERICS)}."
            )

    @property
    def is_invariant(self) -> bool:
        """True if the bits may not depend on the degree."""
        return self.numerics == "invariant"


DEFAULT_SCHEME = Scheme()
