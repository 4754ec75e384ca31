"""Styles: how one module is cut. Frozen data, nothing that communicates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

from shardproof.errors import PlanError
from shardproof.quantities import LARGEST, real_number, whole_number
from shardproof.scheme import DEFAULT_SCHEME, Scheme, checked_scheme
from shardproof.wording import few, shown

MOST = 1_000_000  # of anything that may be a generator without end

Norms = Literal["heads", "across"]


@dataclass(frozen=True)
class ColumnParallel:
    """Cut a linear's out_features.

    Attributes:
        gather_input: the input comes as Shard(-1) and is gathered first.
        gather_output: the output is gathered; else it stays Shard(-1).
    """

    gather_input: bool = False
    gather_output: bool = False

    def __post_init__(self) -> None:
        _require_flags(self, "gather_input", "gather_output")


@dataclass(frozen=True)
class RowParallel:
    """Cut a linear's in_features; the output is summed to Replicate.

    Attributes:
        input_is_parallel: False if the input comes whole and is to be cut here.
    """

    input_is_parallel: bool = True

    def __post_init__(self) -> None:
        _require_flags(self, "input_is_parallel")


@dataclass(frozen=True)
class VocabParallel:
    """Cut an embedding's num_embeddings; every row is picked on the rank that has it.

    A head that shares its weight is cut by `ColumnParallel`: along the same dim, the vocabulary.

    Attributes:
        scale: what the rows are multiplied with, where the embedding does that itself (Gemma).
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        scale = real_number(self.scale)
        if scale is None or not math.isfinite(scale):
            raise _wrong(self, "scale", "a finite number")
        object.__setattr__(self, "scale", scale)


@dataclass(frozen=True)
class Attention:
    """Cut an attention module by heads: its query, key, value and output linears and its norms.

    Query, key and value are cut along their output by whole heads, the output linear along its
    input by the same query heads. The first three read one input, and share one sum of its
    gradient. A key-value head is held by every rank whose query heads need it.

    Attributes:
        queries: query heads.
        keys: key-value heads; each serves queries / keys query heads that stand side by side.
        head_dim: features of one head.
        query, key, value, output: names of the linears, children of the module.
        query_norm, key_norm: names of the children that normalise queries and keys, if there are
            any.
        norms: over what these do: the features of each head by itself ("heads"), or those of all
            heads together ("across").
        attend: name of a child that computes the attention itself, in whose place ours is put: it
            is tried and must compute what ours does. None: the module's own code attends, with cut
            tensors; a model of transformers finds ours in the library's registry.
    """

    queries: int
    keys: int
    head_dim: int
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    norms: Norms = "heads"
    attend: str | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "head_dim"):
            number = whole_number(getattr(self, name))
            if number is None or not 1 <= number <= LARGEST:
                raise _wrong(self, name, "a positive whole number")
            object.__setattr__(self, name, number)
        for name in ("query", "key", "value", "output"):
            if not _is_name(getattr(self, name)):
                raise _wrong(self, name, "the name of a child")
        for name in ("query_norm", "key_norm", "attend"):
            if getattr(self, name) is not None and not _is_name(getattr(self, name)):
                raise _wrong(self, name, "the name of a child, or None")
        if not isinstance(self.norms, str) or self.norms not in get_args(Norms):
            raise _wrong(self, "norms", 'one of "heads" and "across"')

    @property
    def children(self) -> tuple[str, ...]:
        """Names of the children that are cut."""
        norms = (self.query_norm, self.key_norm)
        linears = (self.query, self.key, self.value, self.output)
        return (*linears, *(norm for norm in norms if norm is not None))


@dataclass(frozen=True)
class SharedInput:
    """Children that are `ColumnParallel` and read one input share one sum of its gradient.

    It changes which additions are made, so it is a part of the plan and the same at every degree.

    Attributes:
        members: names of these children.
    """

    members: tuple[str, ...] = ("gate_proj", "up_proj")

    def __post_init__(self) -> None:
        try:
            members = () if isinstance(self.members, str) else tuple(islice(self.members, MOST))
        except TypeError:  # it is no collection
            members = ()
        if not members or not all(map(_is_name, members)):
            raise _wrong(self, "members", "a tuple of names of children")
        object.__setattr__(self, "members", members)


def _require_flags(style: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(style, name), bool):
            raise _wrong(style, name, "True or False")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _wrong(style: Any, name: str, rule: str) -> PlanError:
    kind = type(style).__name__
    return PlanError(f"{kind}({name}={shown(getattr(style, name))}) is not {rule}. Give that.")


Style = ColumnParallel | RowParallel | VocabParallel | Attention | SharedInput

# Spellings that Hugging Face model configurations use in `tp_plan`.
SPELLINGS: dict[str, Style] = {
    "colwise": ColumnParallel(),
    "rowwise": RowParallel(),
    "colwise_gather_output": ColumnParallel(gather_output=True),
    "colwise_rep": ColumnParallel(gather_output=True),
    "rowwise_split_input": RowParallel(input_is_parallel=False),
    "rowwise_rep": RowParallel(input_is_parallel=False),
    "embedding_rowwise": VocabParallel(),
}

# Spellings that cut nothing: left whole; and left whole inside an attention that is cut by heads.
WHOLE = "replicate"
HEAD_NORM = "replicated_with_grad_allreduce"

_EXPERTS = "mixture of experts is not supported yet"

# Spellings that mean something which this library does not do.
REFUSED: dict[str, str] = {
    "grouped_gemm": _EXPERTS,
    "ep_router": _EXPERTS,
    "ep_dispatch_experts": _EXPERTS,
    "moe_tp_experts": _EXPERTS,
    "moe_identity_expert": _EXPERTS,
    "packed_colwise": "projections that are fused into one weight are not supported yet",
    "packed_rowwise": "projections that are fused into one weight are not supported yet",
    "mla_kv_a_proj": "multi-head latent attention is not supported yet",
    "local_params": "parameters that are cut outside of a linear are not supported yet",
    "embedding_colwise": "embeddings are cut along the vocabulary only",
    "all_reduce": "modules whose outputs are partial sums are not supported yet",
    "sequence_parallel": "sequence parallelism is not supported yet",
}


@dataclass(frozen=True)
class Plan:
    """How a model is cut: the same at every degree.

    Attributes:
        styles: module pattern -> style; `*` stands for one segment of a name, or a part of one.
        scheme: leaves, numerics, seed.
    """

    styles: Mapping[str, Style | str] = field(default_factory=dict)
    scheme: Scheme = DEFAULT_SCHEME

    def __post_init__(self) -> None:
        checked_scheme(self.scheme)
        if not isinstance(self.styles, Mapping):
            raise PlanError(
                f"Plan(styles={shown(self.styles)}) is not a dict of patterns and styles. Write "
                'for instance Plan({"layers.*.up": "colwise", "layers.*.down": "rowwise"}).'
            )
        wrong = [pattern for pattern in self.styles if not isinstance(pattern, str)]
        if wrong:
            raise PlanError(
                f"the plan has the pattern {few(map(shown, wrong))}, and a pattern is text, the "
                'name of a module with * where names differ: "layers.*.up".'
            )
