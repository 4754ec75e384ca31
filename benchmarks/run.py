"""The run itself: first right, then fast, in interleaved rounds; and the report as plain data.

Ranks of one machine share a clock. The time of a step is that from when the slowest rank ended the
step before to when the slowest rank ended this one: the times add up to what the work took, and no
rank's waiting is counted twice.
"""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, TypeVar

from benchmarks.groups import FirstStep, Groups, Key, SystemFailure, first_step, stamps
from benchmarks.planning import Job, Plan
from benchmarks.report import environment
from benchmarks.systems import find_system

Data = dict[str, Any]
Rounds = Sequence[Sequence[float]]  # seconds of each step, round by round
Progress = Callable[[int, int, str], None]  # so many of how many things are done; what is next
T = TypeVar("T")


def run(
    plan: Plan,
    *,
    command: str,
    progress: Progress = lambda *_: None,
    keep: Callable[[Data], None] = lambda _: None,
) -> Data:
    """Measure everything.

    Args:
        plan: what.
        command: that asked for it, for the report.
        progress: told what happens.
        keep: given the report so far whenever a work is done and another follows.

    Returns:
        The report: "environment", "results", "all_reduce", "skipped", "failed", how it was
        measured, and "complete": if all that was planned is in it; plain data.
    """
    report: Data = {
        "environment": environment(),
        "command": command,
        "rounds": plan.rounds,
        "quick": plan.is_quick,
        "complete": False,
        "results": [],
        "all_reduce": [],
        "skipped": [asdict(skip) for skip in plan.skips],
        "failed": [],
    }
    total, done = sum((plan.rounds + 1) * len(job.keys) for job in plan.jobs), 0

    with Groups() as groups:
        for job, following in zip(plan.jobs, [*plan.jobs[1:], None], strict=True):
            tell = functools.partial(progress, done, total)
            measurement = _Measurement(groups, job, report["failed"])
            tell(f"{job}: starting {len(job.keys)} systems")
            groups.start(job.keys)
            measurement.check(tell)
            for number in range(plan.rounds):
                progress(
                    done + (number + 1) * len(job.keys),
                    total,
                    f"{job}: round {number + 1} of {plan.rounds}",
                )
                measurement.time(number)
            report[job.work.section] += measurement.rows()
            done += (plan.rounds + 1) * len(job.keys)
            # A group has half a GiB: those that the next job does not need must not stay.
            groups.close(set(job.keys).difference(following.keys if following else ()))
            if following is not None and following.work is not job.work:
                keep(report)
    return report | {"complete": True}


def turn(keys: Sequence[T], number: int) -> list[T]:
    """In which order the systems are measured in one round.

    There and back, then the same from the next one on, so that none is always the first or always
    comes after the same one.

    >>> turn([1, 2, 3], 0), turn([1, 2, 3], 1), turn([1, 2, 3], 2)
    ([1, 2, 3], [3, 2, 1], [2, 3, 1])
    """
    first = number // 2 % len(keys)
    rotated = [*keys[first:], *keys[:first]]
    return rotated[::-1] if number % 2 else rotated


class _Measurement:
    """One job.

    Args:
        groups: its processes, which run.
        job: what to measure.
        failed: where failures are added; a system that failed is not timed.
    """

    def __init__(self, groups: Groups, job: Job, failed: list[Data]) -> None:
        self._groups, self._job, self._failed = groups, job, failed
        self._first: dict[Key, list[FirstStep]] = {}  # of the systems that were right so far
        self._rounds: dict[Key, list[list[float]]] = {key: [] for key in job.keys}

    def check(self, tell: Callable[[str], None]) -> None:
        """Let every system run one first step; it must be right."""
        folder = self._groups.folder / "reference"
        folder.mkdir()
        for key in self._job.keys:
            tell(f"{self._job}: checking {_text(key)}")
            look = functools.partial(
                first_step,
                variant=self._job.variant,
                folder=folder,
                keeps=key in self._job.yardsticks,
            )
            ranks = self._ask(key, look)
            if ranks is None:
                continue
            wrong = [
                f"{fault} on rank {rank}"
                for rank, each in enumerate(ranks)
                for fault in each.faults
            ]
            if wrong:
                more = f"; {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
                self._fail(key, wrong[0] + more)
            else:
                self._first[key] = ranks
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        self._compare_bits()
        self._require_yardstick()

    def time(self, number: int) -> None:
        """One round: every system that was right runs some steps."""
        for key in turn(self._job.keys, number):
            if key in self._first:
                ends = self._ask(key, functools.partial(stamps, variant=self._job.variant))
                if ends is not None:
                    self._rounds[key].append(durations(ends))

    def rows(self) -> list[Data]:
        """What was measured."""
        self._require_yardstick()
        row = self._result_row if self._job.work.has_ratio else self._all_reduce_row
        return [row(key, self._first[key]) for key in self._job.keys if key in self._first]

    def _ask(self, key: Key, fn: Callable[..., Any]) -> list[Any] | None:
        """The answers of all ranks; None if the system failed, which is reported."""
        try:
            return self._groups.run(key, fn)
        except SystemFailure as failure:
            self._fail(key, str(failure))
            return None

    def _fail(self, key: Key, reason: str) -> None:
        self._first.pop(key, None)
        self._failed.append(
            {"work": self._job.work.name, **self._job.variant.keys}
            | {"system": key.system, "ranks": key.ranks, "reason": reason}
        )

    def _compare_bits(self) -> None:
        """The invariant systems must have the same bits, whatever carries them."""
        known: dict[str, tuple[Key, str]] = {}
        for key, ranks in list(self._first.items()):
            for rank, each in enumerate(ranks):
                for name, sha in each.hashes.items():
                    other, expected = known.setdefault(name, (key, sha))
                    if sha != expected and key in self._first:
                        of = f"that of {_text(other)}"
                        self._fail(key, f"{name} has other bits than {of}, on rank {rank}")

    def _require_yardstick(self) -> None:
        """Without the yardstick there are no ratios: nothing is timed and nothing reported."""
        if not self._job.work.has_ratio or self._job.yardsticks[0] in self._first:
            return
        for key in list(self._first):
            yardstick = self._job.work.yardstick
            self._fail(key, f"is not measured, because its yardstick {yardstick} fails")

    def _result_row(self, key: Key, first: list[FirstStep]) -> Data:
        rounds, yardstick = self._rounds[key], self._rounds[self._job.yardsticks[0]]
        seconds = [each for steps in rounds for each in steps]
        low, high = ratio_quartiles(rounds, yardstick)
        counted = most([each.figures for each in first])
        return {
            "work": self._job.work.name,
            **self._job.variant.keys,
            "system": key.system,
            "ranks": key.ranks,
            "median_ms": _rounded(statistics.median(seconds) * 1e3),
            "min_ms": _rounded(min(seconds) * 1e3),
            "p90_ms": _rounded(percentile(seconds, 0.9) * 1e3),
            "ratio": _rounded(median(rounds) / median(yardstick)),
            "ratio_low": _rounded(low),
            "ratio_high": _rounded(high),
            "steps": len(seconds),
            **_facts(key, first),
            **{f"{name}_per_rank": value for name, value in counted.items()},
        }

    def _all_reduce_row(self, key: Key, first: list[FirstStep]) -> Data:
        seconds = [each for steps in self._rounds[key] for each in steps]
        middle = statistics.median(seconds)
        return {
            **self._job.variant.keys,
            "ranks": key.ranks,
            "system": key.system,
            "median_us": _rounded(middle * 1e6),
            "p99_us": _rounded(percentile(seconds, 0.99) * 1e6),
            "min_us": _rounded(min(seconds) * 1e6),
            "gb_per_s": _rounded(self._job.variant.keys["bytes"] / middle / 1e9),
            "steps": len(seconds),
            **_facts(key, first),
        }


def _facts(key: Key, first: list[FirstStep]) -> Data:
    return {
        "threads": find_system(key.system).threads,
        "transport": first[0].wire,
        "contract": first[0].contract,
    }


def _text(key: Key) -> str:
    """A group for messages.

    >>> _text(Key("native-shm", 2)), _text(Key("torch-2t", 1))
    ('native-shm on 2 ranks', 'torch-2t')
    """
    if find_system(key.system).engine == "alone":
        return key.system
    return f"{key.system} on {key.ranks} rank{'s' if key.ranks > 1 else ''}"


# -- from time stamps to figures -------------------------------------------------------------------


def durations(ends: Sequence[Sequence[int]]) -> list[float]:
    """Seconds of each step, by the slowest rank.

    Args:
        ends: for each rank, nanoseconds at the end of the warm-up and of each step.

    >>> durations([[0, 10, 30], [5, 9, 40]])
    [5e-09, 3e-08]
    """
    slowest = [max(at) for at in zip(*ends, strict=True)]
    return [(end - start) / 1e9 for start, end in pairwise(slowest)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by `share` of all.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([3.0, 1.0], 0.99)
    (2.0, 3.0)
    """
    rank = math.ceil(share * len(values))
    return sorted(values)[max(rank, 1) - 1]


def median(rounds: Rounds) -> float:
    """Over all steps of all rounds."""
    return statistics.median(seconds for steps in rounds for seconds in steps)


def ratio_quartiles(rounds: Rounds, yardstick: Rounds) -> tuple[float, float]:
    """The quartiles of the ratio of two systems' medians in each round; below 1 is faster.

    >>> ratio_quartiles([[2.0, 2.0], [3.0, 3.0]], [[1.0, 1.0], [2.0, 2.0]])
    (1.5, 2.0)
    """
    ratios = [
        statistics.median(mine) / statistics.median(other)
        for mine, other in zip(rounds, yardstick, strict=True)
    ]
    return percentile(ratios, 0.25), percentile(ratios, 0.75)


def most(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure the largest over the ranks.

    >>> most([{"flops": 3}, {"flops": 5}])
    {'flops': 5}
    """
    return {name: max(each[name] for each in figures) for name in figures[0]}


def _rounded(number: float) -> float:
    """With as many digits as a clock can mean.

    >>> _rounded(12.3456789), _rounded(0.00123456)
    (12.346, 0.0012346)
    """
    return float(f"{number:.5g}")
