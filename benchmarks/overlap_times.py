"""What overlap is worth: the same training step with sums overlapped and not.

    python benchmarks/overlap_times.py

Two ranks of one thread for each setting and transport, started once; rounds are interleaved, a step
takes as long as its slowest rank. Weights must have the same bits under every setting before
anything is timed. The table has medians and, in brackets, the ratio to no overlap.
"""

import argparse
import contextlib
import functools
import hashlib
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import shardproof as sp
from shardproof.overlap import Overlap
from shardproof.ranks import open_ranks

SETTINGS = {
    "off": Overlap(backward=False, chunks=1),
    "backward": Overlap(backward=True, chunks=1),
    "backward, 2 chunks": Overlap(backward=True, chunks=2),
    "backward, 4 chunks": Overlap(backward=True, chunks=4),
}
PLACES = {
    "shm": ("processes", "shm"),
    "gloo": ("processes", "gloo"),
    "threads": ("threads", "auto"),
}
# h, tokens
SIZES = ((256, 32), (1024, 256), (1024, 1024))

Step = Callable[[], None]


def step_of(axis: sp.Axis, hidden: int, tokens: int) -> tuple[torch.nn.Module, Step]:
    """A feed-forward block and one training step of it."""
    drawn = torch.Generator().manual_seed(0)  # its own: ranks as threads share torch's
    up = torch.nn.Linear(hidden, 4 * hidden, bias=False)
    down = torch.nn.Linear(4 * hidden, hidden, bias=False)
    for layer in (up, down):
        torch.nn.init.normal_(layer.weight, std=0.02, generator=drawn)
    block = torch.nn.Sequential(
        sp.ColumnParallelLinear.from_linear(up, axis=axis),
        torch.nn.ReLU(),
        sp.RowParallelLinear.from_linear(down, axis=axis),
    )
    x = torch.randn(tokens, hidden, generator=drawn).requires_grad_()
    grad = torch.randn(tokens, hidden, generator=drawn)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        block(x).backward(grad)
        optimizer.step()

    return block, step


def digest(axis: sp.Axis, hidden: int, tokens: int) -> str:
    """SHA-256 of this rank's weights after two steps."""
    block, step = step_of(axis, hidden, tokens)
    step()
    step()
    weights = b"".join(p.detach().numpy().tobytes() for p in block.parameters())
    return hashlib.sha256(weights).hexdigest()


def seconds(axis: sp.Axis, hidden: int, tokens: int, steps: int) -> list[float]:
    """How long each step took on this rank."""
    _, step = step_of(axis, hidden, tokens)
    for _ in range(3):
        step()
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    return found


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--transport", action="append", choices=PLACES, help="default all")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="only the first so many")
    options = parser.parse_args()
    places = {name: PLACES[name] for name in options.transport or PLACES}
    sizes = SIZES[: options.sizes]
    taken: dict[tuple[str, str, tuple[int, int]], list[float]] = {}
    with contextlib.ExitStack() as stack:
        ranks = {
            (place, name): stack.enter_context(
                open_ranks(2, engine, threads=1, transport=transport, overlap=overlap)
            )
            for place, (engine, transport) in places.items()
            for name, overlap in SETTINGS.items()
        }
        for size in sizes:
            tell = functools.partial(digest, hidden=size[0], tokens=size[1])
            found = {tuple(each.run(tell)) for each in ranks.values()}
            assert len(found) == 1, f"bits differ at {size}"
        for _ in range(options.rounds):
            for size in sizes:
                measure = functools.partial(
                    seconds, hidden=size[0], tokens=size[1], steps=options.steps
                )
                for (place, name), each in ranks.items():
                    slowest = [max(step) for step in zip(*each.run(measure), strict=True)]
                    taken.setdefault((place, name, size), []).extend(slowest)
    table = Table(title="feed-forward step on 2 ranks, ms (ratio to off)")
    table.add_column("transport")
    table.add_column("h, tokens")
    for name in SETTINGS:
        table.add_column(name, justify="right")
    for place in places:
        for size in sizes:
            medians = [statistics.median(taken[place, name, size]) for name in SETTINGS]
            cells = [f"{each * 1e3:.2f} ({each / medians[0]:.2f})" for each in medians]
            table.add_row(place, f"{size[0]}, {size[1]}", *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
