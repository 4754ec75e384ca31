"""An all-reduce of 4 KiB to 64 MiB beside a copy of the same bytes."""

import functools
from collections.abc import Iterator

import torch

from shardproof.bench.system import SUM, Party, Summing
from shardproof.bench.work import Evidence, Variant, Work
from shardproof.errors import UsageError

KIB, MIB = 1 << 10, 1 << 20
# bytes -> steps in one round at 2 ranks: some milliseconds each, but enough of them for a p99
SIZES = {
    4 * KIB: 400,
    16 * KIB: 300,
    64 * KIB: 300,
    256 * KIB: 150,
    1 * MIB: 60,
    4 * MIB: 20,
    16 * MIB: 6,
    64 * MIB: 3,
}
QUICK = (4 * KIB, 64 * KIB, 1 * MIB)
LARGEST_AT_4 = 1 * MIB


class AllReduce:
    """One rank's sum of a tensor, again and again from the same input.

    Args:
        party: the rank; a yardstick that copies is expected to copy.
        num_bytes: of the message, float32.
    """

    def __init__(self, party: Party, num_bytes: int) -> None:
        if not isinstance(party, Summing):
            raise UsageError(f"{type(party).__name__} offers no sum. Leave it out of all-reduce.")
        self._layout = party.layout((num_bytes // 4,), None)
        # Small whole numbers: every order of additions gives the same.
        base = torch.arange(num_bytes // 4).remainder(1000).float()
        x = base * (party.rank + 1)
        total = party.size * (party.size + 1) // 2
        self._expected = base * (total if party.adds else party.rank + 1)
        self._size = party.size
        self.step = party.make_sum(x, torch.empty_like(x))

    def evidence(self) -> Iterator[Evidence]:
        """The sum, against whole numbers that are added exactly."""
        yield Evidence(f"sum of {self._size}", self.step(), self._layout, self._expected)

    def figures(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}


def _variants() -> Iterator[Variant]:
    for num_bytes, steps in SIZES.items():
        yield Variant(
            functools.partial(AllReduce, num_bytes=num_bytes),
            frozenset({SUM}),
            steps,
            warm_up=max(1, steps // 4),
            ranks=(2, 4) if num_bytes <= LARGEST_AT_4 else (2,),
            keys={"bytes": num_bytes},
            is_quick=num_bytes in QUICK,
        )


ALL_REDUCE = Work(
    "all-reduce",
    "one sum over the ranks, float32, 4 KiB to 64 MiB",
    tuple(_variants()),
    yardstick="memcpy",
    section="all_reduce",
)
