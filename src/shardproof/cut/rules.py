"""All rules, by being imported."""

from shardproof.cut import (
    calls,
    conv,
    einsum,
    foreign,
    joined,
    linear,
    lines,
    lookup,
    moves,
    others,
    pointwise,
    solves,
)

__all__ = [
    "calls",
    "conv",
    "einsum",
    "foreign",
    "joined",
    "linear",
    "lines",
    "lookup",
    "moves",
    "others",
    "pointwise",
    "solves",
]
