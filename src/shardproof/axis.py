"""One axis: the ranks that split tensors together, as one of them sees it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from shardproof.transport.base import Transport


@dataclass(frozen=True)
class Axis:
    """A name, a rank, a size and a transport. Passed to whatever communicates.

    Attributes:
        name: of the axis, for messages ("tp").
        transport: carries bytes between the ranks.
    """

    name: str
    transport: Transport
    _unnamed: Iterator[int] = field(
        default_factory=itertools.count, init=False, repr=False, compare=False
    )

    @property
    def size(self) -> int:
        """Number of ranks: the degree."""
        return self.transport.size

    @property
    def rank(self) -> int:
        """This rank's place on the axis, not its global rank."""
        return self.transport.rank

    def next_name(self, kind: str) -> str:
        """A name for a layer that was given none, by its position among those.

        Ranks build their layers in the same order, so the name does not depend on the degree.
        """
        return f"{kind}-{next(self._unnamed)}"

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on axis {self.name!r}"
