"""Where the microseconds of a tiny layer go: a 64 x 64 linear, batch 16, one rank, one thread.

    python benchmarks/layer_profile.py

Every line is a call that contains the lines further in, timed by itself in the same process: lower
quartile of many calls. The layer is measured beside `nn.Linear`, rounds interleaved.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import shardproof as sp
from shardproof.numerics import matmul, mode
from shardproof.numerics.sums import sum_rows
from shardproof.ops import rows

SIZE, ROWS = 64, 16

Part = tuple[str, Callable[[], object]]


def lower_quartile(call: Callable[[], object], calls: int) -> float:
    """Microseconds of one call."""
    found = []
    for _ in range(calls):
        began = time.perf_counter_ns()
        call()
        found.append(time.perf_counter_ns() - began)
    return statistics.quantiles(found, n=4)[0] / 1e3


def parts() -> Iterator[Part]:
    """What is timed, from the outside in."""
    torch.manual_seed(0)
    plain = nn.Linear(SIZE, SIZE)
    axis = sp.Axis.solo()
    native = sp.Scheme(numerics="native")
    column = sp.ColumnParallelLinear.from_linear(plain, axis=axis)
    row = sp.RowParallelLinear.from_linear(plain, axis=axis)
    column_native = sp.ColumnParallelLinear.from_linear(plain, axis=axis, scheme=native)
    weight, bias, leaves = plain.weight.detach(), plain.bias.detach(), column.split.leaves
    x, grad = torch.randn(ROWS, SIZE), torch.randn(ROWS, SIZE)
    needy = torch.randn(ROWS, SIZE, requires_grad=True)

    def frozen(module: nn.Module) -> Callable[[], object]:
        """Without a gradient to compute there is no graph, as under no_grad."""
        still = copy.deepcopy(module).requires_grad_(False)
        return lambda: still(x)

    yield "forward", lambda: None
    yield "  nn.Linear", frozen(plain)
    yield "  ColumnParallelLinear, native", frozen(column_native)
    yield "  RowParallelLinear, invariant", frozen(row)
    yield "  ColumnParallelLinear, invariant", frozen(column)
    yield (
        "    nn.Module, width of the input, weight and bias",
        lambda: (
            column._width,
            column.weight,
            column.bias,
            x.size(-1),
        ),
    )
    yield "    numerics allowed here?", mode.require_invariant
    yield "    autocast?", lambda: rows.is_autocast(x)
    yield "    one dtype, one device?", lambda: rows.check_alike(x, weight, bias, "")
    yield "    product", lambda: matmul.linear(x, weight, bias, leaves.slices)
    yield "      memory of the output", lambda: x.new_empty(ROWS, SIZE)
    yield "    (torch's product: F.linear)", lambda: F.linear(x, weight, bias)
    yield "forward with a graph", lambda: None
    yield "  nn.Linear", lambda: plain(needy)
    yield "  ColumnParallelLinear, native", lambda: column_native(needy)
    yield "  ColumnParallelLinear, invariant", lambda: column(needy)
    yield "forward and backward", lambda: None
    yield "  nn.Linear", lambda: plain(needy).backward(grad)
    yield "  ColumnParallelLinear, native", lambda: column_native(needy).backward(grad)
    yield "  RowParallelLinear, invariant", lambda: row(needy).backward(grad)
    yield "  ColumnParallelLinear, invariant", lambda: column(needy).backward(grad)
    yield (
        "    input gradient: leaf products by the tree",
        lambda: matmul.product_sum(grad, weight, leaves.slices),
    )
    yield "    weight gradient", lambda: matmul.product_rows(grad.t(), x, leaves.slices)
    yield "    bias gradient", lambda: sum_rows(grad)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=400, help="of every line in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed = list(parts())
    found: list[list[float]] = [[] for _ in timed]
    for _ in range(options.rounds):
        for times, (_, call) in zip(found, timed, strict=True):
            times.append(lower_quartile(call, options.calls))
    table = Table(title="us of a 64 x 64 linear, batch 16")
    table.add_column("what")
    table.add_column("us", justify="right")
    for (name, _), times in zip(timed, found, strict=True):
        is_head = not name.startswith(" ")
        table.add_row(name, "" if is_head else f"{statistics.median(times):.1f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
