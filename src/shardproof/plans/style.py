"""Styles: how one module is cut. Frozen data, nothing that communicates."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardproof.scheme import DEFAULT_SCHEME, Scheme


@dataclass(frozen=True)
class ColumnParallel:
    """Cut a linear's out_features.

    Attributes:
        gather_input: the input comes as Shard(-1) and is gathered first.
        gather_output: the output is gathered; else it stays Shard(-1).
    """

    gather_input: bool = False
    gather_output: bool = False


@dataclass(frozen=True)
class RowParallel:
    """Cut a linear's in_features; the output is summed to Replicate.

    Attributes:
        input_is_parallel: False if the input comes whole and is to be cut here.
    """

    input_is_parallel: bool = True


Style = ColumnParallel | RowParallel

# The spellings that Hugging Face model configurations use in `tp_plan`.
SPELLINGS: dict[str, Style] = {"colwise": ColumnParallel(), "rowwise": RowParallel()}


@dataclass(frozen=True)
class Plan:
    """How a model is cut: the same at every degree.

    Attributes:
        styles: module pattern -> style; `*` stands for one segment of a name, or a part of one.
        scheme: leaves, numerics, seed.
    """

    styles: Mapping[str, Style | str] = field(default_factory=dict)
    scheme: Scheme = DEFAULT_SCHEME
