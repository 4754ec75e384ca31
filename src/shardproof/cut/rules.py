"""All rules, by being imported."""

from shardproof.cut import (
    calls,
    checked,
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
)

__all__ = [
    "calls",
    "checked",
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
]
