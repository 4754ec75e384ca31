"""Linear layers for the cases, and the numbers in them.

A layer is cut where the run has an axis, and a plain `nn.Linear` in plain torch. Its numbers are
drawn row by row from one generator, so no rank ever holds a full weight: every rank draws all rows
in the same order and keeps its own part of each, plain torch keeps them all. The numbers therefore
do not depend on the degree. torch's global generator is never used: ranks that are threads share
it.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.functional import mse_loss
from shardproof.layers.base import ShardedModule
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.leaves import Layout, replicated
from shardproof.prover.case import CaseRun
from shardproof.prover.training import MakeOptimizer

DrawRows = Callable[[range], Tensor]  # rows wanted -> (len(rows), row length)


def column_linear(
    run: CaseRun, in_features: int, out_features: int, *, name: str, bias: bool = True, **cut: bool
) -> nn.Module:
    """A linear layer cut along out_features, uninitialised.

    Args:
        run: of the case.
        in_features: global size.
        out_features: global size.
        name: for messages.
        bias: whether there is one.
        cut: `gather_input` and `gather_output` of `ColumnParallelLinear`.
    """
    return _linear(ColumnParallelLinear, run, in_features, out_features, name, bias, cut)


def row_linear(
    run: CaseRun, in_features: int, out_features: int, *, name: str, bias: bool = True, **cut: bool
) -> nn.Module:
    """A linear layer cut along in_features, uninitialised.

    Args:
        run: of the case.
        in_features: global size.
        out_features: global size.
        name: for messages.
        bias: whether there is one.
        cut: `input_is_parallel` of `RowParallelLinear`.
    """
    return _linear(RowParallelLinear, run, in_features, out_features, name, bias, cut)


def _linear(
    kind: type[ColumnParallelLinear] | type[RowParallelLinear],
    run: CaseRun,
    in_features: int,
    out_features: int,
    name: str,
    bias: bool,
    cut: dict[str, bool],
) -> nn.Module:
    options: dict[str, Any] = {"bias": bias, "device": "meta"}
    if run.axis is None:
        return nn.Linear(in_features, out_features, **options).to_empty(device="cpu")
    options |= {"axis": run.axis, "name": name, "scheme": run.scheme, **cut}
    return kind(in_features, out_features, **options).to_empty(device="cpu")


def generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for a name, seeded by the seed and the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def layout_of(layer: nn.Module, name: str) -> Layout:
    """Layout of a layer's own parameter; replicated in a plain layer."""
    if isinstance(layer, ShardedModule):
        return layer.layouts[name]
    return replicated(tuple(layer.get_parameter(name).shape))


@torch.no_grad()
def fill(layer: nn.Module, name: str, draw_rows: DrawRows, *, rows_at_once: int = 1) -> None:
    """Fill one parameter of a layer, sharded or plain.

    Args:
        layer: a layer with memory (not on the meta device).
        name: of the parameter, a matrix; a vector is filled as one row.
        draw_rows: draws some rows of the full parameter; called for all rows, in order.
        rows_at_once: how many rows it draws in one call.
    """
    parameter, layout = layer.get_parameter(name), layout_of(layer, name)
    owned = layout.owned
    if parameter.ndim == 1:
        parameter.copy_(draw_rows(range(1))[0, owned.start : owned.stop])
        return
    for start in range(0, layout.shape[0], rows_at_once):
        drawn = range(start, min(start + rows_at_once, layout.shape[0]))
        rows = draw_rows(drawn)
        if layout.dim == 1:
            parameter[drawn.start : drawn.stop].copy_(rows[:, owned.start : owned.stop])
            continue
        first, last = max(drawn.start, owned.start), min(drawn.stop, owned.stop)
        if first < last:
            owned_rows = rows[first - start : last - start]
            parameter[first - owned.start : last - owned.start].copy_(owned_rows)


def fill_normal(layer: nn.Module, name: str, generator: torch.Generator) -> None:
    """Fill one parameter from N(0, 1), eight rows at a time."""
    length = layout_of(layer, name).shape[-1]

    def draw_rows(rows: range) -> Tensor:
        return torch.randn(len(rows), length, generator=generator)

    fill(layer, name, draw_rows, rows_at_once=8)


def fill_like_linear(layer: nn.Module, generator: torch.Generator) -> None:
    """Fill weight, then bias, with exactly the numbers that `nn.Linear` draws for itself.

    `uniform_` is sequential: row by row it draws the same numbers as in one call for all.

    Args:
        layer: a linear layer, sharded or plain.
        generator: with the seed of torch's global generator it draws as `nn.Linear` does.
    """
    in_features = layout_of(layer, "weight").shape[1]
    # Kaiming's bound for a = sqrt(5), in the order of operations of nn.init, to the last bit.
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    weight_bound = math.sqrt(3.0) * (gain / math.sqrt(in_features))
    fill(layer, "weight", lambda rows: _uniform(len(rows), in_features, weight_bound, generator))
    if getattr(layer, "bias", None) is not None:
        length, bias_bound = layout_of(layer, "bias").shape[0], 1 / math.sqrt(in_features)
        fill(layer, "bias", lambda rows: _uniform(1, length, bias_bound, generator))


def _uniform(rows: int, length: int, bound: float, generator: torch.Generator) -> Tensor:
    return torch.empty(rows, length).uniform_(-bound, bound, generator=generator)


def mean_squared_error(run: CaseRun, output: Tensor, target: Tensor) -> Tensor:
    """The loss of most cases: ours on ranks, torch's in plain torch."""
    return F.mse_loss(output, target) if run.axis is None else mse_loss(output, target)


def sgd(learning_rate: float) -> MakeOptimizer:
    """Makes plain gradient descent."""
    return functools.partial(torch.optim.SGD, lr=learning_rate)
