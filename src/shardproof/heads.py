"""`Heads`: which ranks own and hold query heads and key-value heads. Integers only.

The unit is the query head at every degree. Ranks share the leaves of query heads. Every rank with a
query head that needs a key-value head holds it, and the first of these ranks owns it. With fewer
key-value heads than ranks, some are held several times, but count once.
"""

from dataclasses import dataclass
from functools import cached_property

from shardproof.errors import ShapeError
from shardproof.leaves import Cut


@dataclass(frozen=True)
class Heads:
    """The heads of one attention layer on `degree` ranks.

    Attributes:
        queries: number of query heads, on all ranks together.
        keys: number of key-value heads; each serves `group` neighbouring query heads.
        head_dim: features of one head.
        leaves: number of leaves of the plan.
        degree: number of ranks.
    """

    queries: int
    keys: int
    head_dim: int
    leaves: int
    degree: int

    def __post_init__(self) -> None:
        if self.queries < 1 or self.keys < 1 or self.queries % self.keys:
            raise ShapeError(
                f"{self.queries} query heads cannot share {self.keys} key-value heads: every "
                "key-value head serves the same number of query heads."
            )

    @property
    def group(self) -> int:
        """Number of query heads that share one key-value head."""
        return self.queries // self.keys

    @cached_property
    def query_cut(self) -> Cut:
        """The cut of the queries' features, queries * head_dim."""
        return Cut(self.queries * self.head_dim, self.leaves, self.degree, self.head_dim)

    @cached_property
    def key_cut(self) -> Cut:
        """The cut of the keys' or values' features, keys * head_dim, with one leaf per head."""
        runs = tuple(self._firsts(self.owned(rank)) for rank in range(self.degree))
        return Cut(self.keys * self.head_dim, self.leaves, self.degree, self.head_dim, runs)

    def owned(self, rank: int) -> range:
        """Query heads that `rank` owns."""
        owned = self.query_cut.owned(rank)
        return range(owned.start // self.head_dim, owned.stop // self.head_dim)

    def held(self, rank: int) -> range:
        """Key-value heads that `rank` holds: those that its query heads need.

        >>> Heads(queries=4, keys=2, head_dim=8, leaves=8, degree=3).held(1)
        range(1, 2)
        """
        owned = self.owned(rank)
        if not owned:
            return range(0)
        return range(owned.start // self.group, (owned.stop - 1) // self.group + 1)

    def served(self, key: int, rank: int) -> range:
        """Query heads of `rank` that key-value head `key` serves, counted within its group."""
        owned, first = self.owned(rank), key * self.group
        start, stop = max(owned.start, first), min(owned.stop, first + self.group)
        return range(start - first, stop - first) if start < stop else range(0)

    def shared(self) -> tuple[int, ...]:
        """Key-value heads that more than one rank holds."""
        holders = [sum(key in self.held(rank) for rank in range(self.degree)) for key in self._all]
        return tuple(key for key, count in enumerate(holders) if count > 1)

    def key_slices(self, rank: int) -> tuple[slice, ...]:
        """For each leaf of query heads that `rank` owns, the key-value heads that begin in it.

        They are slices of features of the rank's part; empty if no head begins in the leaf. At
        every degree, each key-value head is in exactly one leaf, so that q, k and v can share one
        sum.
        """
        start = self.held(rank).start
        slices = []
        for index in self.query_cut.run(rank):
            leaf = self.query_cut.leaf(index)
            keys = self._firsts(range(leaf.start // self.head_dim, leaf.stop // self.head_dim))
            if not keys:
                slices.append(slice(0, 0))
                continue
            slices.append(
                slice((keys.start - start) * self.head_dim, (keys.stop - start) * self.head_dim)
            )
        return tuple(slices)

    @property
    def _all(self) -> range:
        return range(self.keys)

    def _firsts(self, queries: range) -> range:
        """Key-value heads whose first query head is in a run of query heads."""
        first = -(-queries.start // self.group)
        return range(first, max(first, -(-queries.stop // self.group)))
