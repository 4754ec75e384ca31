"""`Ledger`: counts calls and bytes of the collectives on an axis, by direction and kind."""

from collections.abc import Iterator
from dataclasses import dataclass

DIRECTIONS = ("setup", "forward", "backward", "update", "prover")


@dataclass
class Count:
    """The counts of one kind of collective on this rank.

    Attributes:
        calls: number of collectives.
        message_bytes: bytes of their results, summed.
        sent_bytes: bytes that this rank sent to others, summed.
    """

    calls: int = 0
    message_bytes: int = 0
    sent_bytes: int = 0


class Ledger:
    """The counts of one rank on one axis. Ranks do not share it, so it needs no lock.

    Attributes:
        links: number of another host -> bytes that this rank sent there; empty if the ranks of
            the axis do not sum inside their hosts first.
    """

    def __init__(self) -> None:
        self.links: dict[int, int] = {}
        self._counts: dict[tuple[str, str], Count] = {}

    def add(self, direction: str, kind: str, *, message_bytes: int, sent_bytes: int) -> None:
        """Count one collective."""
        count = self._counts.get((direction, kind))
        if count is None:
            count = self._counts[direction, kind] = Count()
        count.calls += 1
        count.message_bytes += message_bytes
        count.sent_bytes += sent_bytes

    def __iter__(self) -> Iterator[tuple[str, str, Count]]:
        for (direction, kind), count in sorted(self._counts.items()):
            yield direction, kind, count

    def calls(self, direction: str, kind: str) -> int:
        """Number of collectives of one kind in one direction."""
        return self._counts.get((direction, kind), Count()).calls

    def reset(self) -> None:
        """Set all counts to 0."""
        self.links.clear()
        self._counts.clear()

    def as_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        """Direction -> collective -> counts, for reports."""
        table: dict[str, dict[str, dict[str, int]]] = {}
        for direction, kind, count in self:
            table.setdefault(direction, {})[kind] = vars(count).copy()
        return table
