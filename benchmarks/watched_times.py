"""What the generic path costs: a Llama that is cut by watching, beside one that is cut by its plan.

    python benchmarks/watched_times.py --degree 2

Both models are in the same processes and take turns, and their losses and logits must have the same
bits. A ratio is of the medians of one round on the slowest rank; the table has the median over all
rounds. Above 1 the watched model is slower.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import shardproof as sp
from shardproof.bench.works.llama import BATCH, NEW_TOKENS, PROMPT, RATE, SEED, TOKENS, Size, build

STEPS = {"llama-step": 4, "llama-generate": 2}  # of one round


def stepper(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """Forward with labels, backward and SGD; gives the loss."""
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> Tensor:
        sgd.zero_grad()
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        sgd.step()
        return loss.detach()

    return step


def generator(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """Greedy generation; gives the tokens."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    prompt = tokens[:1, :PROMPT]
    mask = torch.ones_like(prompt)
    return lambda: model.generate(prompt, attention_mask=mask, pad_token_id=0, **options)


def timed(axis: sp.Axis, hidden: int, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of a step of each model, by work and round."""
    drawn = torch.Generator().manual_seed(SEED)
    size = Size(hidden=hidden, intermediate=hidden * 11 // 4)
    whole = build(size, drawn)
    tokens = torch.randint(size.vocabulary, (BATCH, TOKENS), generator=drawn)
    watched = copy.deepcopy(whole)
    sp.parallelize(watched, None, axis, inputs={"input_ids": tokens, "labels": tokens})
    named = sp.parallelize(whole, None, axis)
    found: dict[str, list[list[float]]] = {}
    for work, make in (("llama-generate", generator), ("llama-step", stepper)):
        both = [make(named, tokens), make(watched, tokens)]
        for _ in range(3):
            first, second = (each() for each in both)
            assert torch.equal(first, second), (work, first, second)
        found[work] = []
        for number in range(rounds):
            seconds = [0.0, 0.0]
            for place in (0, 1) if number % 2 else (1, 0):
                steps = []
                for _ in range(STEPS[work]):
                    began = time.perf_counter()
                    both[place]()
                    steps.append(time.perf_counter() - began)
                seconds[place] = median(steps)
            found[work].append(seconds)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=Size().hidden)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
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
