"""Times one training step of every case: plain torch, native and invariant, at degrees 1, 2 and 4.

    python -m benchmarks.case_times --rounds 7 --markdown docs/case-times.md

Plain torch and native run in processes of their own with the BLAS library in its default mode, for
the mode is per process. All processes live for the whole run and take turns, round by round, so
that a slow minute of the machine hits all of them. Ranks are threads; of two cores, one rank gets
two intra-op threads and more ranks get one each. A step's time is that of the slowest rank; a
figure is the median over all rounds. Equality comes first: nothing is timed unless every case is
proved at the degrees that are timed. The last line of the output is one JSON document.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

import shardproof
from benchmarks.groups import environment
from benchmarks.systems import find_system
from shardproof.axis import Axis
from shardproof.prover.case import CaseRun
from shardproof.prover.cases import all_cases, digits, find_case
from shardproof.prover.cases.text_training import TextTraining, clip, standard_library
from shardproof.prover.proof import DEFAULT_SEED, prove_cases
from shardproof.prover.training import Batch, Training, make_optimizer
from shardproof.ranks import open_ranks
from shardproof.scheme import Numerics, Scheme

DEGREES = (1, 2, 4)
CORES = 2
# What is timed -> the system of `python -m benchmarks` in whose environment it runs.
SYSTEMS = {"torch": "torch-2t", "native": "native-threads", "invariant": "invariant-threads"}
WARM_UP = 3


class Bare(CaseRun):
    """A run that measures and keeps nothing: a timed run is not the proof."""

    def __init__(self, axis: Axis | None, numerics: Numerics) -> None:
        scheme = Scheme(numerics=numerics)
        super().__init__(axis=axis, scheme=scheme, seed=DEFAULT_SEED, recorder=self)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """A phase whose allocations nobody counts."""
        yield

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Take one tensor and drop it."""


def step_of(name: str, run: Bare) -> Callable[[], None]:
    """One training step of a case, ready to be called again and again."""
    training = find_case(name).work
    if name == "digits":
        model = digits.build(run)
        optimizer = digits.sgd(model.parameters())
        data = itertools.cycle(digits.batches(digits.load(run.seed), run.seed, epoch=1))
        return lambda: digits.train_step(run, model, optimizer, *next(data))
    if isinstance(training, TextTraining):
        return functools.partial(_read, training, run, *_open(training, run))
    if not isinstance(training, Training):
        return lambda: training(run)  # as small as a step: build, forward, loss, backward
    return functools.partial(_step, training, run, *_prepare(training, run))


def _open(training: TextTraining, run: Bare) -> tuple[nn.Module, Optimizer, Tensor]:
    model = training.source.build(run, dropout=0.0)
    tokens = standard_library().windows(
        seed=run.seed,
        step=0,
        rows=training.rows,
        length=training.length,
        vocabulary=training.source.vocabulary,
    )
    return model, training.adamw(model.parameters()), tokens


def _read(
    training: TextTraining, run: Bare, model: nn.Module, optimizer: Optimizer, tokens: Tensor
) -> None:
    optimizer.zero_grad(set_to_none=True)
    training.source.score(run, model, tokens).loss.backward()
    clip(run, model, training.max_norm)
    optimizer.step()


def _prepare(training: Training, run: Bare) -> tuple[Batch, nn.Module, Optimizer | None]:
    batch = training.batch(run)
    inputs = tuple(x.detach().clone() for x in batch.inputs)
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    model = training.build(run)
    optimizer = make_optimizer(training.optimizer, model) if training.optimizer else None
    return Batch(inputs, batch.target), model, optimizer


def _step(
    training: Training, run: Bare, batch: Batch, model: nn.Module, optimizer: Optimizer | None
) -> None:
    training.loss(run, model(*batch.inputs), batch.target).backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    for x in batch.inputs:
        x.grad = None


def time_steps(axis: Axis | None, name: str, numerics: Numerics, steps: int) -> list[float]:
    """Seconds of each training step of one case on this rank, after a warm-up."""
    step = step_of(name, Bare(axis, numerics))
    seconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def timed_here(
    solo: Axis, *, system: str, name: str, degree: int, threads: int, steps: int
) -> list[float]:
    """Seconds of each training step of one case by the slowest rank; runs in a system's process."""
    if system == "torch":
        torch.set_num_threads(threads)
        return time_steps(None, name, "native", steps)
    numerics: Numerics = "native" if system == "native" else "invariant"
    timed = functools.partial(time_steps, name=name, numerics=numerics, steps=steps)
    with open_ranks(degree, "threads", threads=threads) as ranks:
        return [max(step) for step in zip(*ranks.run(timed), strict=True)]


def measure(names: list[str], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Median milliseconds of every case, system and degree, and the ratio to plain torch."""
    keys = [("torch", 1), *((s, d) for s in ("native", "invariant") for d in DEGREES)]
    seconds: dict[tuple[str, str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        processes = {}
        for system, like in SYSTEMS.items():
            variables = environment(find_system(like))
            opened = open_ranks(1, "processes", threads=CORES, environment=variables)
            processes[system] = stack.enter_context(opened)
        for done in range(rounds):
            for name in names:
                for system, degree in keys:
                    timed = functools.partial(
                        timed_here,
                        system=system,
                        name=name,
                        degree=degree,
                        threads=max(1, CORES // degree),
                        steps=steps,
                    )
                    (taken,) = processes[system].run(timed)
                    seconds.setdefault((name, system, degree), []).extend(taken)
            print(f"round {done + 1} of {rounds}", file=sys.stderr)
    results = []
    for (name, system, degree), taken in seconds.items():
        median = statistics.median(taken)
        base = statistics.median(seconds[name, "torch", 1])
        results.append(
            {
                "case": name,
                "system": system,
                "degree": degree,
                "median_ms": round(median * 1e3, 4),
                "min_ms": round(min(taken) * 1e3, 4),
                "ratio": round(median / base, 3),
            }
        )
    return results


def rows_of(results: list[dict[str, Any]]) -> list[list[str]]:
    """One row per case: plain torch's time, and ratios to it."""
    by_key = {(r["case"], r["system"], r["degree"]): r for r in results}
    rows = []
    for name in dict.fromkeys(r["case"] for r in results):
        row = [name, f"{by_key[name, 'torch', 1]['median_ms']:.3f}"]
        for system in ("native", "invariant"):
            row += [f"{by_key[name, system, degree]['ratio']:.2f}" for degree in DEGREES]
        rows.append(row)
    return rows


def markdown(results: list[dict[str, Any]], versions: dict[str, Any], command: str) -> str:
    """The page docs/case-times.md."""
    head = ["case", "plain torch, ms"]
    head += [f"{system} {degree}" for system in ("native", "invariant") for degree in DEGREES]
    lines = [
        "# Time of one training step of every case",
        "",
        "Median over all rounds, slowest rank; native and invariant at degrees 1, 2 and 4 as a "
        "ratio to plain torch in the same run. "
        "Plain torch and native ran in processes of their own with the BLAS library in its "
        "default mode. Ranks are threads on two cores, so degree 4 has twice as many ranks as "
        "cores. The cases are small, most of them tiny: what they show is overhead, not speed.",
        "",
        f"    {command}",
        "",
        "; ".join(f"{key} {value}" for key, value in versions.items()) + ".",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows_of(results)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prove, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", action="append", help="a case; repeatable; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    installed = [case for case in all_cases() if case.is_installed]
    cases = [find_case(name) for name in options.case] if options.case else installed
    report = prove_cases(cases, degrees=DEGREES)
    if not report.proved:
        raise SystemExit(f"nothing is timed: {report.verdict()}")
    results = measure([case.name for case in cases], options.rounds, options.steps)
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "shardproof": shardproof.__version__,
    }
    command = " ".join(["python -m benchmarks.case_times", *sys.argv[1:]])
    table = Table(title="plain torch in ms; all others as a ratio to it, by degree")
    table.add_column("case", no_wrap=True)
    table.add_column("torch", justify="right")
    for system in ("native", "invariant"):
        for degree in DEGREES:
            table.add_column(f"{system}\n{degree}", justify="right")
    for row in rows_of(results):
        table.add_row(*row)
    Console(width=100).print(table)
    if options.markdown:
        options.markdown.write_text(markdown(results, versions, command), encoding="utf-8")
    print(json.dumps({"command": command, "environment": versions, "results": results}))


if __name__ == "__main__":
    main()
