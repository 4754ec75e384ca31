"""Numbers for the cases: drawn row by row from one generator, so that no rank holds a full weight.

Every rank draws all rows in the same order and keeps its own part of each; plain torch keeps them
all. The numbers then do not depend on the degree, and the largest thing drawn is one row.
torch's global generator is never touched: ranks as threads share it.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardproof.layers.base import ShardedModule
from shardproof.leaves import Layout, replicated

DrawRows = Callable[[range], Tensor]  # rows wanted -> (len(rows), row length)


def generator(seed: int, name: str) -> torch.Generator:
    """An own generator, keyed by seed and name."""
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
        draw_rows: makes some rows of the full parameter; called for all of them, in order.
        rows_at_once: how many rows it is asked for; never the full parameter, if that is large.
    """
    parameter, layout = layer.get_parameter(name), layout_of(layer, name)
    owned = layout.owned
    if parameter.ndim == 1:
        parameter.copy_(draw_rows(range(1))[0, owned.start : owned.stop])
        return
    for start in range(0, layout.shape[0], rows_at_once):
        asked = range(start, min(start + rows_at_once, layout.shape[0]))
        rows = draw_rows(asked)
        if layout.dim == 1:
            parameter[asked.start : asked.stop].copy_(rows[:, owned.start : owned.stop])
            continue
        first, last = max(asked.start, owned.start), min(asked.stop, owned.stop)
        if first < last:
            kept = rows[first - start : last - start]
            parameter[first - owned.start : last - owned.start].copy_(kept)


def fill_normal(layer: nn.Module, name: str, generator: torch.Generator) -> None:
    """Fill one parameter from N(0, 1), eight rows at a time."""
    length = layout_of(layer, name).shape[-1]

    def draw_rows(rows: range) -> Tensor:
        return torch.randn(len(rows), length, generator=generator)

    fill(layer, name, draw_rows, rows_at_once=8)


def fill_like_linear(layer: nn.Module, generator: torch.Generator) -> None:
    """Fill weight, then bias, with the very numbers that `nn.Linear` draws for itself.

    `uniform_` is sequential: row by row it gives what one call for the whole weight gives.

    Args:
        layer: a linear layer, sharded or plain.
        generator: one seeded like torch's global generator gives the draw of `nn.Linear`.
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
