"""The leaves of a batch that a forward and backward computes: runs of samples, fixed by the plan.

`DataParallel` cuts the samples of a step into leaves and enters `running` around each pass. What
sums over the batch or draws for it then asks `current`. Outside of `DataParallel` there are no
batch leaves. They belong to the thread, in which `DataParallel` lets backward run too. Integers
only; no tensors.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shardproof.errors import NumericsError


@dataclass(frozen=True)
class BatchLeaves:
    """The leaves of one pass.

    Attributes:
        leaves: numbers of the leaves in the whole batch.
        sizes: number of samples of each.
    """

    leaves: range
    sizes: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Number of samples of the pass."""
        return sum(self.sizes)

    def row_slices(self, rows: int, what: str) -> tuple[slice, ...]:
        """Where each leaf lies in `rows` rows, which hold the samples one after the other.

        Args:
            rows: number of rows, the same for each sample.
            what: what has the rows, for messages.

        Raises:
            NumericsError: the samples cannot have the same number of rows each.
        """
        if len(self.sizes) == 1:
            return (slice(0, rows),)
        per_sample, rest = divmod(rows, self.num_samples)
        if rest:
            raise NumericsError(
                f"{what} has {rows} rows for {self.num_samples} samples, so that the rows of a "
                "sample are not known. Use DataParallel(..., passes='leaf'), which computes each "
                "batch leaf by itself."
            )
        slices, start = [], 0
        for size in self.sizes:
            stop = start + size * per_sample
            slices.append(slice(start, stop))
            start = stop
        return tuple(slices)


_local = threading.local()


def several() -> BatchLeaves | None:
    """The leaves of the pass that this thread is in, if there are several."""
    leaves = current()
    return None if leaves is None or len(leaves.sizes) == 1 else leaves


def current() -> BatchLeaves | None:
    """The leaves of the pass that this thread is in; None outside of `DataParallel`."""
    leaves: BatchLeaves | None = getattr(_local, "leaves", None)
    return leaves


@contextmanager
def running(leaves: BatchLeaves) -> Iterator[None]:
    """A pass over some leaves."""
    before = current()
    _local.leaves = leaves
    try:
        yield
    finally:
        _local.leaves = before
