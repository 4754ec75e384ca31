"""Runs of indices: take them out of a tensor, join such parts, and divide sizes into runs."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Run = range | slice

_FEW = 32  # up to so many runs are copied one by one; for more, an index tensor is used


def take(x: Tensor, dim: int, runs: Sequence[Run]) -> Tensor:
    """Concatenate some runs of a tensor.

    Args:
        x: (*).
        dim: the dim of the runs, counted from the front.
        runs: the runs, in the order of the result.

    Returns:
        (*, sum of lengths, *): a view of one run, a new tensor of several.
    """
    if len(runs) > _FEW:
        return x.index_select(dim, indices(runs).to(x.device))
    if not runs:
        return x.narrow(dim, 0, 0)
    parts = [x.narrow(dim, run.start, run.stop - run.start) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def join(parts: Sequence[Tensor], dim: int, runs: Sequence[Sequence[Run]]) -> Tensor:
    """Join parts, each of which has some runs of the whole.

    Args:
        parts: (*, length, *), one for each entry of `runs`.
        dim: the dim of the runs, counted from the front.
        runs: for each part the runs of its indices in the whole; together they cover it.

    Returns:
        (*, sum of lengths, *), a new tensor.
    """
    whole = list(parts[0].shape)
    whole[dim] = sum(part.shape[dim] for part in parts)
    y = parts[0].new_empty(whole)
    for part, places in zip(parts, runs, strict=True):
        if len(places) > _FEW:
            y.index_copy_(dim, indices(places).to(y.device), part)
            continue
        start = 0
        for place in places:
            length = place.stop - place.start
            y.narrow(dim, place.start, length).copy_(part.narrow(dim, start, length))
            start += length
    return y


def runs_up_to(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Divide things into runs, each of at most so many units or of one larger thing.

    Args:
        sizes: units of each thing.
        most: units of a run.

    >>> list(runs_up_to([3, 2, 9, 1], 5))
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    start = filled = 0
    for place, size in enumerate(sizes):
        if place > start and filled + size > most:
            yield range(start, place)
            start, filled = place, 0
        filled += size
    if sizes:
        yield range(start, len(sizes))


def indices(runs: Sequence[Run]) -> Tensor:
    """(sum of lengths,), int64: the indices of some runs."""
    return torch.from_numpy(
        np.concatenate([np.arange(run.start, run.stop, dtype=np.int64) for run in runs])
    )
