"""The bench itself: right first, then fast, in interleaved rounds; and the report as plain data."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shardproof.bench import figures
from shardproof.bench.environment import environment
from shardproof.bench.fleet import Fleet, SystemFailure
from shardproof.bench.jobs import Job, Key, Plan
from shardproof.bench.rank import Drop, Hello, Order, Prepare, Prepared, Time
from shardproof.bench.systems.catalog import find_system

Data = dict[str, Any]


class Progress(Protocol):
    """Called before each thing that takes time."""

    def __call__(self, done: int, total: int, text: str, /) -> None:
        """`done` of `total` things are done, `text` is next."""


@dataclass
class Failures:
    """What went wrong: nothing of it is timed, and the bench says no in the end."""

    found: list[Data] = field(default_factory=list)

    def add(self, job: Job, key: Key, reason: str) -> None:
        """Remember one."""
        keys = dict(job.variant.keys)
        self.found.append(
            {"work": job.work.name, **keys, "system": key.system, "ranks": key.ranks}
            | {"reason": reason}
        )


def run(
    plan: Plan,
    *,
    command: str,
    progress: Progress | None = None,
    keep: Callable[[Data], None] | None = None,
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
    failures = Failures()
    sections: dict[str, list[Data]] = {"results": [], "all_reduce": []}
    steps = _Steps(plan, progress)
    found_here = environment()

    def report(*, is_complete: bool) -> Data:
        return {
            "environment": found_here,
            "command": command,
            "rounds": plan.rounds,
            "quick": plan.is_quick,
            "complete": is_complete,
            **sections,
            "skipped": [asdict(skip) for skip in plan.skips],
            "failed": failures.found,
        }

    with Fleet() as fleet:
        for place, job in enumerate(plan.jobs):
            following = plan.jobs[place + 1 : place + 2]  # one or none
            steps.at(f"{job.work.name}: starting")
            fleet.start(job.keys)
            measured = _Measurement(fleet, job, failures, steps).run(plan.rounds)
            sections[job.work.section] += measured
            # A rank holds a quarter of a GiB: whom the next job does not need must not stay.
            fleet.end(set(job.keys).difference(*(other.keys for other in following)))
            if keep is not None and any(other.work is not job.work for other in following):
                keep(report(is_complete=False))
    return report(is_complete=True)


def turn(keys: Sequence[Key], number: int) -> list[Key]:
    """In which order the systems are measured in one round.

    There and back, then the same from the next one on, so that none is always the first or always
    comes after the same one.

    >>> turn([1, 2, 3], 0), turn([1, 2, 3], 1), turn([1, 2, 3], 2)
    ([1, 2, 3], [3, 2, 1], [2, 3, 1])
    """
    first = number // 2 % len(keys)
    rotated = [*keys[first:], *keys[:first]]
    return rotated[::-1] if number % 2 else rotated


class _Steps:
    """Counts what is done for the progress line."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self._progress = progress
        self._done = 0
        self._total = sum((plan.rounds + 1) * len(job.keys) for job in plan.jobs)

    def at(self, text: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, text)

    def pass_over(self) -> None:
        self._done += 1


class _Measurement:
    """One job."""

    def __init__(self, fleet: Fleet, job: Job, failures: Failures, steps: _Steps) -> None:
        self._fleet, self._job, self._failures, self._steps = fleet, job, failures, steps
        label = job.variant.label
        self._name = f"{job.work.name} ({label})" if label else job.work.name
        self._prepared: dict[Key, list[Prepared]] = {}
        self._rounds: dict[Key, list[list[float]]] = {}

    def run(self, rounds: int) -> list[Data]:
        """Prepare and check everybody, then let them take turns; the rows of the report."""
        folder = self._fleet.folder / "reference"
        folder.mkdir()
        try:
            for key in self._job.keys:
                self._prepare(key, folder)
        finally:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        self._compare_bits()
        self._require_yardstick()
        for number in range(rounds):
            self._steps.at(f"{self._name}: round {number + 1} of {rounds}")
            for key in turn(self._job.keys, number):
                self._time(key)
        self._require_yardstick()
        self._drop()
        return [self._row(key) for key in self._job.keys if key in self._prepared]

    def _prepare(self, key: Key, folder: Path) -> None:
        """One first step on every rank, which must be right."""
        self._steps.at(f"{self._name}: checking {_text(key)}")
        order = Prepare(
            self._job.work.name, self._job.place, folder, keeps=key in self._job.yardsticks
        )
        prepared = self._ask(key, order)
        self._steps.pass_over()
        if prepared is None:
            return
        wrong = [
            f"{finding.name} of rank {rank} {finding.text}"
            for rank, each in enumerate(prepared)
            for finding in each.findings
        ]
        if wrong:
            more = f"; {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
            self._refuse(key, wrong[0] + more)
        else:
            self._prepared[key] = prepared
            self._rounds[key] = []

    def _compare_bits(self) -> None:
        """The invariant systems must have the same bits, whatever carries them."""
        first: dict[str, tuple[Key, str]] = {}
        for key in list(self._prepared):
            for rank, each in enumerate(self._prepared[key]):
                differing = [
                    (name, first[name][0])
                    for name, sha in each.hashes.items()
                    if first.setdefault(name, (key, sha))[1] != sha
                ]
                if differing:
                    name, other = differing[0]
                    self._refuse(
                        key, f"{name} of rank {rank} has other bits than that of {_text(other)}"
                    )
                    break

    def _time(self, key: Key) -> None:
        """One round of one system."""
        self._steps.pass_over()
        if key not in self._prepared:
            return
        variant = self._job.variant
        stamps = self._ask(key, Time(variant.warm_up, variant.steps))
        if stamps is None:
            del self._prepared[key]
        else:
            self._rounds[key].append(figures.durations(stamps))

    def _ask(self, key: Key, order: Order) -> list[Any] | None:
        """The answers of all ranks; None if the system failed, which is remembered."""
        try:
            return self._fleet.ask(key, order)
        except SystemFailure as failure:
            self._failures.add(self._job, key, str(failure))
            return None

    def _refuse(self, key: Key, reason: str) -> None:
        self._failures.add(self._job, key, reason)
        self._prepared.pop(key, None)

    def _require_yardstick(self) -> None:
        """Without it there are no ratios, and nothing to report."""
        if not self._job.work.has_ratio or self._job.yardsticks[0] in self._prepared:
            return
        for key in list(self._prepared):
            yardstick = self._job.work.yardstick
            self._refuse(key, f"is not measured, for its yardstick {yardstick} fails")

    def _drop(self) -> None:
        """Let everybody let go of the model; one that failed has none."""
        for key in self._job.keys:
            if self._fleet.is_running(key):
                self._ask(key, Drop())

    def _row(self, key: Key) -> Data:
        make = _all_reduce_row if not self._job.work.has_ratio else self._result_row
        return make(self._job, key, self._rounds[key], self._fleet.hello(key))

    def _result_row(self, job: Job, key: Key, rounds: figures.Rounds, hello: Hello) -> Data:
        ratio = figures.ratio(rounds, self._rounds[job.yardsticks[0]])
        found = figures.summary(rounds)
        counted = figures.most([each.figures for each in self._prepared[key]])
        return {
            "work": job.work.name,
            **job.variant.keys,
            "system": key.system,
            "ranks": key.ranks,
            "median_ms": _rounded(found.median * 1e3),
            "min_ms": _rounded(found.least * 1e3),
            "p90_ms": _rounded(found.p90 * 1e3),
            "ratio": _rounded(ratio.value),
            "ratio_low": _rounded(ratio.low),
            "ratio_high": _rounded(ratio.high),
            "steps": found.steps,
            **_facts(key, hello),
            **{f"{name}_per_rank": value for name, value in counted.items()},
        }


def _all_reduce_row(job: Job, key: Key, rounds: figures.Rounds, hello: Hello) -> Data:
    found = figures.summary(rounds)
    return {
        **job.variant.keys,
        "ranks": key.ranks,
        "system": key.system,
        "median_us": _rounded(found.median * 1e6),
        "p99_us": _rounded(found.p99 * 1e6),
        "min_us": _rounded(found.least * 1e6),
        "gb_per_s": _rounded(job.variant.keys["bytes"] / found.median / 1e9),
        "steps": found.steps,
        **_facts(key, hello),
    }


def _facts(key: Key, hello: Hello) -> Data:
    return {
        "threads": find_system(key.system).threads,
        "transport": hello.transport,
        "contract": hello.contract,
    }


def _rounded(number: float) -> float:
    """With as many digits as a clock can mean.

    >>> _rounded(12.3456789), _rounded(0.00123456)
    (12.346, 0.0012346)
    """
    return float(f"{number:.5g}")


def _text(key: Key) -> str:
    """A group for messages.

    >>> _text(Key("native-shm", 2)), _text(Key("torch-2t", 1))
    ('native-shm on 2 ranks', 'torch-2t')
    """
    if find_system(key.system).engine == "alone":
        return key.system
    return f"{key.system} on {key.ranks} rank{'s' if key.ranks > 1 else ''}"
