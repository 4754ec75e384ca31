"""Styles: how one module is cut. Frozen data; nothing here communicates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

from shardproof.checked_values import LARGEST, real_number, whole_number
from shardproof.errors import PlanError
from shardproof.scheme import DEFAULT_SCHEME, Scheme, checked_scheme
from shardproof.wording import few, short_repr

MOST = 1_000_000  # entries read from a collection, which may be an endless generator

Norms = Literal["heads", "across"]


@dataclass(frozen=True)
class ColumnParallel:
    """Cut a linear's out_features.

    Attributes:
        gather_input: whether the input is Shard(-1) and is gathered first.
        gather_output: whether the output is gathered; otherwise it stays Shard(-1).
    """

    gather_input: bool = False
    gather_output: bool = False

    def __post_init__(self) -> None:
        _require_flags(self, "gather_input", "gather_output")


@dataclass(frozen=True)
class RowParallel:
    """Cut a linear's in_features; the output is summed to Replicate.

    Attributes:
        input_is_parallel: whether the input is Shard(-1); False if it is whole and is cut here.
    """

    input_is_parallel: bool = True

    def __post_init__(self) -> None:
        _require_flags(self, "input_is_parallel")


@dataclass(frozen=True)
class VocabParallel:
    """Cut an embedding's num_embeddings; each row is looked up on the rank that holds it.

    Cut a head that shares its weight by `ColumnParallel`, along the same dim, the vocabulary.

    Attributes:
        scale: factor by which the embedding itself multiplies its rows, as in Gemma.
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
        queries: number of query heads.
        keys: number of key-value heads; each serves queries / keys neighbouring query heads.
        head_dim: number of features of one head.
        query, key, value, output: names of the linears among the children of the module.
        query_norm, key_norm: names of the children that normalise queries and keys, or None.
        norms: whether they normalise each head by itself ("heads") or all heads together
            ("across").
        attend: name of the child that computes the attention itself. Our attention replaces it,
            after a check that both compute the same. None: the module's own code attends, with cut
            tensors; a model of transformers calls ours through the registry of that library.
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
    """`ColumnParallel` children with one input share one sum of the input's gradient.

    This changes the additions, so it is part of the plan and the same at every degree.

    Attributes:
        members: names of these children.
    """

    members: tuple[str, ...] = ("gate_proj", "up_proj")

    def __post_init__(self) -> None:
        try:
            members = () if isinstance(self.members, str) else tuple(islice(self.members, MOST))
        except TypeError:  # not a collection
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
    return PlanError(f"{kind}({name}={short_repr(getattr(style, name))}) is not {rule}. Give that.")


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

# Spellings that cut nothing: a module left whole, and a norm inside an attention cut by heads.
WHOLE = "replicate"
HEAD_NORM = "replicated_with_grad_allreduce"

_EXPERTS = "mixture of experts is not supported yet"

# Spellings of cuts that shardproof does not support.
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
    """Styles by module name, and a scheme: how a model is cut, at any degree.

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
                f"Plan(styles={short_repr(self.styles)}) is not a dict of patterns and styles. "
                "Write "
                'for instance Plan({"layers.*.up": "colwise", "layers.*.down": "rowwise"}).'
            )
        wrong = [pattern for pattern in self.styles if not isinstance(pattern, str)]
        if wrong:
            raise PlanError(
                f"the plan has the pattern {few(map(short_repr, wrong))}, and a pattern is text, "
                "the "
                'name of a module with * where names differ: "layers.*.up".'
            )
