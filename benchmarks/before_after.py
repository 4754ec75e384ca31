"""What a change costs: the same works computed by the code of before and by that of now.

    git worktree add ../before COMMIT
    (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/before_after.py ../before --work ffn-1024 --work llama-step

The processes of both are alive throughout and take turns, and every first step must have the same
bits. A ratio is of the medians of one round, and the table has the median over all rounds: a step
can have two speeds, by where its memory lies, and a median over all steps jumps between the two.
Above 1 the code of now is slower. `noise` is the same ratio of the code of before to itself: its
processes are started twice.
"""

import argparse
import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

from shardproof.bench import figures, fleet
from shardproof.bench.jobs import QUICK_ROUNDS, Job, Key, plan
from shardproof.bench.rank import Drop, Prepare, Time
from shardproof.bench.run import turn

SYSTEMS = ("invariant-shm", "invariant-threads", "invariant-gloo")
SIDES = ("before", "now", "noise")


def with_source(environment: Callable[[str], dict[str, str]], source: Path) -> fleet.Environment:
    """`environment`, with the package taken from `source`."""

    def found(system: str) -> dict[str, str]:
        inherited = environment(system)
        return inherited | {"PYTHONPATH": os.pathsep.join([str(source), inherited["PYTHONPATH"]])}

    return found


def check(prepared: dict[str, list[object]], key: Key) -> None:
    """Raise unless every side computed what is right, and the same bits."""
    for side, ranks in prepared.items():
        for rank, each in enumerate(ranks):
            assert not each.findings, (side, key, rank, each.findings)
            before = prepared["before"][rank].hashes
            other = [name for name, sha in each.hashes.items() if before.get(name, sha) != sha]
            assert not other, (side, key, rank, other)


def measure(
    fleets: dict[str, fleet.Fleet], job: Job, key: Key, rounds: int
) -> dict[str, list[list[float]]]:
    """Seconds of each step, by side and round."""
    variant = job.variant
    folder = fleets["now"].folder / f"reference-{job.work.name}"
    folder.mkdir(exist_ok=True)
    for side in SIDES:
        fleets[side].start([job.yardsticks[0], key] if side == "now" else [key])
    order = functools.partial(Prepare, job.work.name, job.place, folder)
    fleets["now"].ask(job.yardsticks[0], order(keeps=True))
    fleets["now"].end([job.yardsticks[0]])
    check({side: fleets[side].ask(key, order(keeps=False)) for side in SIDES}, key)
    found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in turn(SIDES, number):
            stamps = fleets[side].ask(key, Time(variant.warm_up, variant.steps))
            found[side].append(figures.durations(stamps))
    for side in SIDES:
        fleets[side].ask(key, Drop())
        fleets[side].end([key])
    return found


def compared(one: figures.Rounds, other: figures.Rounds) -> list[float]:
    """The quartiles of the ratio of `one` to `other` over rounds; the second is the median."""
    ratios = [median(a) / median(b) for a, b in zip(one, other, strict=True)]
    return quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of the code of before, built")
    parser.add_argument("--work", action="append", required=True)
    parser.add_argument("--system", action="append", help=f"default: {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, default=QUICK_ROUNDS)
    given = parser.parse_args()
    source = given.before.resolve() / "src"
    jobs = plan(given.work, given.system or SYSTEMS, rounds=given.rounds, is_quick=True).jobs
    table = Table("work", "system", "before ms", "now ms", "ratio", "half of rounds", "noise")
    old = with_source(fleet.environment, source)
    with ExitStack() as stack:
        fleets = {
            "before": stack.enter_context(fleet.Fleet(old)),
            "now": stack.enter_context(fleet.Fleet()),
            "noise": stack.enter_context(fleet.Fleet(old)),
        }
        for job in jobs:
            for key in job.others:
                found = measure(fleets, job, key, given.rounds)
                low, ratio, high = compared(found["now"], found["before"])
                _, noise, _ = compared(found["noise"], found["before"])
                table.add_row(
                    job.work.name,
                    key.system,
                    *(f"{figures.summary(found[side]).median * 1e3:.2f}" for side in SIDES[:2]),
                    f"{ratio:.3f}",
                    f"{low:.3f}-{high:.3f}",
                    f"{noise:.3f}",
                )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
