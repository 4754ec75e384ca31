"""What a change costs: the same works computed by the code of before and by that of now.

    git worktree add ../before COMMIT
    (cd ../before && python setup.py build_ext --inplace)
    python -m benchmarks.before_after ../before --work ffn-1024 --work llama-step

Both sides are timed by the code in this folder, so the package of before must have what it calls.
It cannot time commits from before `benchmarks/` held the bench.
The processes of both sides live throughout and take turns, and every first step must have the same
bits. A ratio is of the medians of one round, and the table has the median over all rounds. Above 1
the code of now is slower. `noise` is the same ratio of the code of before to itself: its processes
are started twice.
"""

import argparse
import contextlib
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import run
from benchmarks.groups import Groups, Key, first_step, stamps
from benchmarks.planning import QUICK_ROUNDS, Job, plan

ROOT = Path(__file__).parents[1]
SYSTEMS = ("invariant-shm", "invariant-threads", "invariant-gloo")


class Side:
    """A process whose package is that of one side; it starts all groups of that side.

    The ranks of a package must be started by the same package, so the engines of this process
    cannot start them.

    Args:
        source: the folder `src` of the side.
    """

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.before_after", "--serve"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(source), str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the side's `Groups`."""
        if self._process.stdin is None or self._process.stdout is None:
            raise SystemExit("the process of a side has no pipes")
        pickle.dump((method, arguments), self._process.stdin)
        self._process.stdin.flush()
        try:
            return pickle.load(self._process.stdout)
        except EOFError:
            raise SystemExit("the process of a side has ended, see above") from None

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, at which it ends


def serve() -> None:
    """Be the process of a side."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a rank prints is no answer
    with Groups(has_modes=False) as groups, contextlib.suppress(EOFError):
        while True:
            method, arguments = pickle.load(sys.stdin.buffer)
            pickle.dump(getattr(groups, method)(*arguments), answers)
            answers.flush()


def check(firsts: Sequence[Any], key: Key) -> None:
    """Raise unless every side computed what is right, and the same bits."""
    for ranks in firsts:
        for before, each in zip(firsts[0], ranks, strict=True):
            assert not each.faults, (key, each.faults)
            assert each.hashes == before.hashes, (key, each.hashes, before.hashes)


def measure(sides: Sequence[Side], job: Job, key: Key, rounds: int) -> list[Any]:
    """Seconds of each step, by side and round."""
    yardstick = job.yardsticks[0]
    for side in sides:
        side.ask("start", [yardstick, key] if side is sides[0] else [key])
    with tempfile.TemporaryDirectory() as folder:
        look = functools.partial(first_step, variant=job.variant, folder=Path(folder))
        sides[0].ask("run", yardstick, functools.partial(look, keeps=True))
        sides[0].ask("close", [yardstick])
        check([side.ask("run", key, functools.partial(look, keeps=False)) for side in sides], key)
    seconds: list[Any] = [[] for _ in sides]
    for number in range(rounds):
        for place in run.turn(range(len(sides)), number):
            ends = sides[place].ask("run", key, functools.partial(stamps, variant=job.variant))
            seconds[place].append(run.durations(ends))
    for side in sides:
        side.ask("close", [key])
    return seconds


def compared(one: run.Rounds, other: run.Rounds) -> list[float]:
    """The quartiles of the ratio of `one` to `other` over rounds; the second is the median."""
    ratios = [median(a) / median(b) for a, b in zip(one, other, strict=True)]
    return quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def main() -> None:
    """Measure and print."""
    if sys.argv[1:] == ["--serve"]:
        serve()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("before", type=Path, help="a checkout of the code of before, built")
    parser.add_argument("--work", action="append", required=True)
    parser.add_argument("--system", action="append", help=f"default: {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, default=QUICK_ROUNDS)
    given = parser.parse_args()
    jobs = plan(given.work, given.system or SYSTEMS, rounds=given.rounds, is_quick=True).jobs
    table = Table("work", "system", "before ms", "now ms", "ratio", "half of rounds", "noise")
    before, now = given.before.resolve() / "src", ROOT / "src"
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(Side(source)) for source in (before, now, before)]
        for job in jobs:
            for key in job.others:
                old, new, again = measure(sides, job, key, given.rounds)
                low, ratio, high = compared(new, old)
                table.add_row(
                    str(job),
                    key.system,
                    *(f"{run.median(each) * 1e3:.2f}" for each in (old, new)),
                    f"{ratio:.3f}",
                    f"{low:.3f}-{high:.3f}",
                    f"{compared(again, old)[1]:.3f}",
                )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
