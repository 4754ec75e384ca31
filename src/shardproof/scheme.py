"""`Scheme`: the leaves, numerics and seed of a plan, which do not depend on the degree."""

from dataclasses import dataclass
from typing import Any, Literal

from shardproof.checked_values import LARGEST, LARGEST_SEED, whole_number
from shardproof.errors import DegreeError, UsageError
from shardproof.leaves import DEFAULT_LEAVES
from shardproof.wording import short_repr

Numerics = Literal["invariant", "native"]
NUMERICS: tuple[Numerics, ...] = ("invariant", "native")


@dataclass(frozen=True)
class Scheme:
    """How the sums of a model are divided, the same at every degree.

    Attributes:
        leaves: number of leaves of a cut dim, which is also the highest possible degree.
        numerics: "invariant" for the same bits at every degree, "native" for one product per
            shard and the transport's own all-reduce.
        seed: seed of all random draws (initialisation, dropout).
    """

    leaves: int = DEFAULT_LEAVES
    numerics: Numerics = "invariant"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("leaves", "seed"):
            value = getattr(self, name)
            number = whole_number(value)  # a bool is an int, but never meant as one here
            if number is None:
                raise UsageError(f"{name}={short_repr(value)} is not a whole number. Give an int.")
            object.__setattr__(self, name, number)
        if self.leaves < 1:
            raise DegreeError(
                f"leaves={short_repr(self.leaves)} is not a positive number. Use 1 or more "
                "(default 8)."
            )
        if self.leaves > LARGEST:
            raise DegreeError(
                f"leaves={short_repr(self.leaves)} is more than any dim has. Use at most {LARGEST} "
                "(default 8)."
            )
        if abs(self.seed) > LARGEST_SEED:
            raise UsageError(
                f"seed={short_repr(self.seed)} is out of range. Use at most {LARGEST_SEED}."
            )
        if not isinstance(self.numerics, str) or self.numerics not in NUMERICS:
            raise UsageError(
                f"unknown numerics {short_repr(self.numerics)}. Use one of: {', '.join(NUMERICS)}."
            )

    @property
    def is_invariant(self) -> bool:
        """Whether the bits must not depend on the degree."""
        return self.numerics == "invariant"


DEFAULT_SCHEME = Scheme()


def checked_scheme(scheme: Any) -> Scheme:
    """Return the argument `scheme` of a user.

    Raises:
        UsageError: it is not a `Scheme`.
    """
    if not isinstance(scheme, Scheme):
        raise UsageError(
            f"scheme={short_repr(scheme)} is not a Scheme. Use for instance "
            "shardproof.Scheme(leaves=8)."
        )
    return scheme
