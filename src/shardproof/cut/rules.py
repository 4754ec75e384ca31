"""All rules, by being imported."""

from shardproof.cut import (
    calls,
    channels,
    checked,
    conv,
    einsum,
    foreign,
    heads,
    joined,
    linear,
    lines,
    lookup,
    losses,
    moves,
    others,
    pointwise,
    solves,
)

__all__ = [
    "calls",
    "channels",
    "checked",
    "conv",
    "einsum",
    "foreign",
    "heads",
    "joined",
    "linear",
    "lines",
    "lookup",
    "losses",
    "moves",
    "others",
    "pointwise",
    "solves",
]
