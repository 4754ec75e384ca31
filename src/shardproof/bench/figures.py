"""From time stamps to figures: plain numbers, no ranks and no clocks.

Ranks of one machine share a clock. The time of a step is that from when the slowest rank ended the
step before to when the slowest rank ended this one: the times add up to what the work took, and no
rank's waiting is counted twice.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Rounds = Sequence[Sequence[float]]  # seconds of each step, round by round


def durations(stamps: Sequence[Sequence[int]]) -> list[float]:
    """Seconds of each step, by the slowest rank.

    Args:
        stamps: for each rank, nanoseconds at the end of the warm-up and of each step.

    >>> durations([[0, 10, 30], [5, 9, 40]])
    [5e-09, 3e-08]
    """
    ends = [max(at) for at in zip(*stamps, strict=True)]
    return [(end - start) / 1e9 for start, end in pairwise(ends)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by `share` of all.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([3.0, 1.0], 0.99)
    (2.0, 3.0)
    """
    rank = math.ceil(share * len(values))
    return sorted(values)[max(rank, 1) - 1]


@dataclass(frozen=True)
class Summary:
    """One system at one variant; seconds.

    Attributes:
        median, least, p90, p99: over all steps of all rounds.
        steps: how many.
    """

    median: float
    least: float
    p90: float
    p99: float
    steps: int


def summary(rounds: Rounds) -> Summary:
    """Over all steps of all rounds."""
    values = [seconds for each in rounds for seconds in each]
    return Summary(
        statistics.median(values),
        min(values),
        percentile(values, 0.9),
        percentile(values, 0.99),
        len(values),
    )


@dataclass(frozen=True)
class Ratio:
    """How a system compares with the yardstick in the same rounds; below 1 is faster.

    Attributes:
        value: of the medians over all steps of all rounds.
        low, high: of the medians of each round, the quartiles: half of the rounds lie between.
    """

    value: float
    low: float
    high: float


def ratio(rounds: Rounds, yardstick: Rounds) -> Ratio:
    """Compare two systems that took turns.

    >>> ratio([[2.0, 2.0], [3.0, 3.0]], [[1.0, 1.0], [2.0, 2.0]])
    Ratio(value=1.6666666666666667, low=1.5, high=2.0)
    """
    each = [
        statistics.median(mine) / statistics.median(other)
        for mine, other in zip(rounds, yardstick, strict=True)
    ]
    value = summary(rounds).median / summary(yardstick).median
    return Ratio(value, percentile(each, 0.25), percentile(each, 0.75))


def most(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure the largest over the ranks.

    >>> most([{"flops": 3}, {"flops": 5}])
    {'flops': 5}
    """
    return {name: max(each[name] for each in figures) for name in figures[0]}
