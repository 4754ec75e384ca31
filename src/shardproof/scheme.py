"""`Scheme`: the leaves, numerics and seed of a plan, which do not depend on the degree."""

from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from shardproof.checked_values import LARGEST, LARGEST_SEED, checked_whole, whole_number
from shardproof.errors import DegreeError, UsageError
from shardproof.leaves import DEFAULT_LEAVES, check_degree, checked_degree
from shardproof.wording import short_repr

Numerics = Literal["invariant", "native"]
NUMERICS: tuple[Numerics, ...] = ("invariant", "native")
MOST_DEGREES = 1000


@dataclass(frozen=True)
class Scheme:
    """How the sums of a model are divided, the same at every degree.

    Attributes:
        leaves: number of leaves of a cut dim, which is also the highest possible degree.
        numerics: "invariant" for the same bits at every degree, "native" for one product per
            shard and the transport's own all-reduce.
        seed: seed of all random draws (initialisation, dropout).
        batch_leaves: number of leaves of a batch; `DataParallel` has at most so many ranks. None:
            batches have no leaves.
    """

    leaves: int = DEFAULT_LEAVES
    numerics: Numerics = "invariant"
    seed: int = 0
    batch_leaves: int | None = None

    def __post_init__(self) -> None:
        if self.batch_leaves is not None:
            count = checked_whole(self.batch_leaves, "batch_leaves", most=LARGEST)
            object.__setattr__(self, "batch_leaves", count)
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

    def __repr__(self) -> str:
        of_batch = "" if self.batch_leaves is None else f", batch_leaves={self.batch_leaves}"
        return (
            f"Scheme(leaves={self.leaves}, numerics={self.numerics!r}, seed={self.seed}{of_batch})"
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


def checked_degrees(degrees: Any, scheme: Scheme | None) -> tuple[int, ...]:
    """The degrees once each, lowest first.

    Args:
        degrees: as the caller wrote them.
        scheme: whose leaves must serve them; None leaves that to the layers.

    Raises:
        DegreeError: one is no whole number, is not positive, or exceeds the leaves.
        UsageError: there is none, or the value is not a list.
    """
    try:
        is_text = isinstance(degrees, str | bytes)
        entries = None if is_text else tuple(islice(degrees, MOST_DEGREES + 1))
    except TypeError:  # cannot be iterated
        entries = None
    if entries is None:
        raise UsageError(
            f"degrees={short_repr(degrees)} is not a list of degrees. Write for instance "
            "degrees=(1, 2)."
        )
    if len(entries) > MOST_DEGREES:
        raise UsageError(
            f"degrees has more than {MOST_DEGREES} entries, and each is a run of its own. Name "
            "fewer, such as (1, 2, 3, 8)."
        )
    ordered = tuple(sorted({checked_degree(degree) for degree in entries}))
    if not ordered:
        raise UsageError("no degree to prove. Name one or more, such as 1 and 2.")
    if scheme is not None:
        checked_scheme(scheme)
        for degree in ordered:
            check_degree(degree, scheme.leaves)
    return ordered
