"""What the canonical tree costs: eight leaf products added up, beside one product of the same size.

    python -m benchmarks.leaf_sums

One thread; both go through the products that invariant numerics use on this machine. Rounds are
interleaved; medians, and the ratio of the leaf-wise sum to the one product.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from shardproof.leaves import Cut
from shardproof.numerics import matmul, mode, products
from shardproof.scheme import Scheme

# rows, contracted, columns: row-parallel forward and column-parallel input gradient of the works
# of the bench, a batch of a small linear, a token
SHAPES = ((256, 1024, 2048), (256, 4096, 1024), (512, 512, 1408), (32, 1024, 608), (1, 4096, 1024))


def once(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One product, with nothing cut."""
    return products.product(a, b) if products.are_ours(a, b, a.shape[0]) else a @ b


def seconds(work: Callable[[], object], calls: int) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--leaves", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mode.require_invariant()
    contract = mode.contract(Scheme(leaves=options.leaves))
    table = Table(title=f"{options.leaves} leaves beside one product; {contract}")
    for heading in ("rows, contracted, columns", "one, us", "leaves, us", "ratio"):
        table.add_column(heading, justify="right")
    for rows, contracted, columns in SHAPES:
        draws = torch.Generator().manual_seed(0)
        a = torch.randn(rows, contracted, generator=draws)
        b = torch.randn(contracted, columns, generator=draws)
        slices = Cut(contracted, options.leaves, 1).leaf_slices(0)
        works: dict[str, Callable[[], torch.Tensor]] = {
            "one": lambda a=a, b=b: once(a, b),  # type: ignore[misc]
            "leaves": lambda a=a, b=b, at=slices: matmul.product_sum(a, b, at),  # type: ignore[misc]
        }
        torch.testing.assert_close(works["one"](), works["leaves"](), rtol=1e-4, atol=1e-3)
        calls = max(1, int(2e-3 / seconds(works["one"], 3)))
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(options.rounds):
            for name, work in works.items():
                taken[name].append(seconds(work, calls))
        one, leaves = (statistics.median(taken[name]) * 1e6 for name in ("one", "leaves"))
        shape = f"{rows}, {contracted}, {columns}"
        table.add_row(shape, f"{one:.0f}", f"{leaves:.0f}", f"{leaves / one:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
