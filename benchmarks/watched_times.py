"""What the generic path costs: a Llama that is cut by watching, beside one that is cut by its plan.

    python -m benchmarks.watched_times --degree 2

Both models are in the same processes and take turns, and their losses and tokens must be the same
bit by bit. A ratio is of the medians of one round on the slowest rank; the table has the median
over all rounds. Above 1 the watched model is slower.
"""

import argparse
import time
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import shardproof as sp
from benchmarks.llama import NEW_TOKENS, LlamaGenerate, LlamaStep, Size
from benchmarks.systems import Ours

STEPS = {"llama-generate": 2, "llama-step": 4}  # of one round


class Watched(Ours):
    """Cuts a model of transformers by watching a forward, also where its plan would serve."""

    def cut_transformer(self, model: nn.Module, *, training: bool) -> nn.Module:
        """`parallelize` with an example."""
        ids = torch.zeros(2, 16, dtype=torch.int64)
        inputs = {"input_ids": ids, "labels": ids}
        return sp.parallelize(model, None, self.axis, inputs=inputs).train(training)


def task(work: str, rank: Ours, size: Size) -> Any:
    """The task of a work with this name."""
    if work == "llama-step":
        return LlamaStep(rank, size)
    return LlamaGenerate(rank, size, NEW_TOKENS)


def timed(axis: sp.Axis, hidden: int, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of a step of each model, by work and round."""
    size = Size(hidden=hidden, intermediate=hidden * 11 // 4)
    found: dict[str, list[list[float]]] = {}
    for work, steps in STEPS.items():
        both = [task(work, kind(axis, "invariant"), size) for kind in (Ours, Watched)]
        for _ in range(3):
            first, second = (each.step() for each in both)
            assert torch.equal(first, second), (work, first, second)
        found[work] = []
        for number in range(rounds):
            seconds = [0.0, 0.0]
            for place in (0, 1) if number % 2 else (1, 0):
                taken = []
                for _ in range(steps):
                    began = time.perf_counter()
                    both[place].step()
                    taken.append(time.perf_counter() - began)
                seconds[place] = median(taken)
            found[work].append(seconds)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=Size().hidden)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    ranks = sp.launch(
        lambda axis: timed(axis, given.hidden, given.rounds),
        degree=given.degree,
        engine="processes",
    )
    table = Table("work", "by its plan ms", "watched ms", "ratio", "half of rounds")
    for work in ranks[0]:
        slowest = [
            [max(rank[work][number][place] for rank in ranks) for place in (0, 1)]
            for number in range(given.rounds)
        ]
        ratios = [watched / named for named, watched in slowest]
        low, ratio, high = quantiles(ratios, n=4, method="inclusive")
        times = [f"{median(each[place] for each in slowest) * 1e3:.2f}" for place in (0, 1)]
        table.add_row(work, *times, f"{ratio:.3f}", f"{low:.3f}-{high:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
