"""`ModulePlanner`: from a module and its style to layouts and collectives. Integers only."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from shardproof.heads import Heads
from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype
from shardproof.plans.cached_layouts import (
    gradient_parts,
    heads_of,
    held_keys,
    layouts,
    shared_keys,
)
from shardproof.plans.collective import Collective, Direction, When
from shardproof.plans.module_plan import ModulePlan, ParameterPlan, Role
from shardproof.plans.style import (
    Attention,
    ColumnParallel,
    RowParallel,
    SharedInput,
    Style,
    VocabParallel,
)
from shardproof.scheme import Scheme

Held = tuple[range, ...] | None


class ModulePlanner:
    """Makes the `ModulePlan` of each module, for one degree.

    Args:
        model: the model; it may lie on the meta device. Its styles have been checked.
        degree: number of ranks.
        scheme: leaves and numerics.
        head: name of the output head whose cut logits the loss takes without a gather, or None.
    """

    def __init__(self, model: nn.Module, degree: int, scheme: Scheme, head: str | None) -> None:
        self._model = model
        self._degree = degree
        self._scheme = scheme
        self._head = head

    def of(self, name: str, style: Style, *, shares: bool = False) -> Iterator[ModulePlan]:
        """The plan of a module, and of the children that its style cuts too.

        Args:
            name: name of the module.
            style: how it is cut.
            shares: whether its input gradient is part of a sum that a shared input counts.
        """
        if isinstance(style, Attention):
            yield from self._attention(name, style)
        elif isinstance(style, SharedInput):
            yield self._shared(name, style)
        elif isinstance(style, VocabParallel):
            yield self._vocabulary(name, style)
        elif isinstance(style, RowParallel):
            yield self._row(name, style)
        else:
            yield self._column(name, style, shares=shares)

    def whole(self, name: str, reason: str) -> ModulePlan:
        """The plan of a module that every rank holds."""
        module = self._model.get_submodule(name)
        parameters = tuple(
            self._parameter(own, value, None, None)
            for own, value in module.named_parameters(recurse=False)
        )
        return ModulePlan(name, type(module).__name__, "whole", None, parameters, reason=reason)

    # -- linears and embeddings --------------------------------------------------------------------

    def _column(self, name: str, style: ColumnParallel, *, shares: bool) -> ModulePlan:
        linear = self._linear(name)
        cut, dtype = self._cut(linear.out_features), linear.weight.dtype
        sends: list[Collective] = []
        if style.gather_input:
            sends += _gathered_input(linear, self._cut(linear.in_features), self._summed(cut))
        elif not shares:
            sends.append(self._input_gradient(linear.in_features, dtype, cut))
        if name == self._head:
            sends = [_of_logits(each) for each in sends] + self._logits(cut, dtype)
        elif style.gather_output:
            sends.append(_gather("forward", "outputs", dtype, cut.sizes()))
        return self._make(name, "column", style, {"weight": 0, "bias": 0}, cut, None, sends)

    def _row(self, name: str, style: RowParallel) -> ModulePlan:
        linear = self._linear(name)
        cut, dtype = self._cut(linear.in_features), linear.weight.dtype
        sends = [self._outputs(linear, cut)]
        if not style.input_is_parallel:
            sends.append(_gather("backward", "input gradient", dtype, cut.sizes()))
        return self._make(name, "row", style, {"weight": 1}, cut, None, sends)

    def _vocabulary(self, name: str, style: VocabParallel) -> ModulePlan:
        embedding = self._model.get_submodule(name)
        rows, width = embedding.weight.shape  # type: ignore[misc]
        dtype: torch.dtype = embedding.weight.dtype  # type: ignore[assignment]
        # cut=None: each row comes from one rank, and bits are added as integers in any order.
        sends = [Collective("all_reduce", "forward", "rows", dtype, int(width))]
        return self._make(
            name, "vocabulary", style, {"weight": 0}, self._cut(int(rows)), None, sends
        )

    def _shared(self, name: str, style: SharedInput) -> ModulePlan:
        first = self._linear(f"{name}.{style.members[0]}" if name else style.members[0])
        cut = self._cut(first.out_features)
        send = self._input_gradient(first.in_features, first.weight.dtype, cut)
        return self._group(name, "shared input", style, cut, [send])

    def _logits(self, cut: Cut, dtype: torch.dtype) -> list[Collective]:
        """Gathered logits, or for the loss three numbers per leaf and token."""
        ranks = range(self._degree)
        # With native numerics, each rank has one block instead of leaves.
        leaves = tuple(
            3 * (len(cut.run(rank)) if self._scheme.is_invariant else 1) for rank in ranks
        )
        return [
            _gather("forward", "logits", dtype, cut.sizes(), "logits"),
            _gather("forward", "loss statistics", node_dtype(dtype), leaves, "labels"),
        ]

    # -- attention ---------------------------------------------------------------------------------

    def _attention(self, name: str, style: Attention) -> Iterator[ModulePlan]:
        heads = heads_of(
            style.queries, style.keys, style.head_dim, self._scheme.leaves, self._degree
        )
        held = held_keys(heads)
        query, output = (
            self._linear(f"{name}.{style.query}"),
            self._linear(f"{name}.{style.output}"),
        )
        dtype = query.weight.dtype
        sends = [self._input_gradient(query.in_features, dtype, heads.query_cut)]
        if shared_keys(heads):
            gradient_sizes = gradient_parts(heads, self._scheme.is_invariant)
            sends.append(
                _gather("backward", "key and value gradients", node_dtype(dtype), gradient_sizes)
            )
        yield self._group(name, "attention", style, heads.query_cut, sends)
        both = {"weight": 0, "bias": 0}
        for role, child in (("query", style.query), ("key", style.key), ("value", style.value)):
            is_query = role == "query"
            cut = heads.query_cut if is_query else heads.key_cut
            yield self._make(
                f"{name}.{child}", role, style, both, cut, None if is_query else held, []
            )
        sends = [self._outputs(output, heads.query_cut)]
        yield self._make(
            f"{name}.{style.output}", "output", style, {"weight": 1}, heads.query_cut, None, sends
        )
        if style.query_norm is not None:
            yield self._norm(f"{name}.{style.query_norm}", "query_norm", style, heads, None)
        if style.key_norm is not None:
            yield self._norm(f"{name}.{style.key_norm}", "key_norm", style, heads, held)

    def _norm(
        self, name: str, role: Role, style: Attention, heads: Heads, held: Held
    ) -> ModulePlan:
        norm = self._model.get_submodule(name)
        cut = heads.query_cut if held is None else heads.key_cut
        weight = next(norm.parameters(recurse=False), None)
        dtype = torch.get_default_dtype() if weight is None else weight.dtype
        if style.norms == "across":
            wide, summed = node_dtype(dtype), self._summed(cut)
            sends = [
                Collective("all_reduce", "forward", "squares", wide, 1, cut=summed),
                Collective("all_reduce", "backward", "products", wide, 1, cut=summed),
            ]
            return self._make(name, role, style, {"weight": 0}, cut, held, sends)
        sends = [
            Collective(
                "all_reduce",
                "backward",
                f"{own} gradient",
                value.dtype,
                fixed=value.numel(),
                cut=self._summed(cut),
            )
            for own, value in norm.named_parameters(recurse=False)
        ]
        return self._make(name, role, style, {}, cut, held, sends)

    # -- what all of them need ---------------------------------------------------------------------

    def _make(
        self,
        name: str,
        role: Role | str,
        style: Style,
        dims: dict[str, int],
        cut: Cut,
        held: Held,
        sends: list[Collective],
    ) -> ModulePlan:
        """The plan of a module with parameters; parameters that `dims` does not name are whole."""
        module = self._model.get_submodule(name)
        parameters = tuple(
            self._parameter(own, value, dims.get(own), cut, held)
            for own, value in module.named_parameters(recurse=False)
        )
        idle = cut.idle_ranks() if held is None else _without(held)
        return ModulePlan(
            name,
            type(module).__name__,
            role,  # type: ignore[arg-type]
            style,
            parameters,
            cut.num_leaves,
            idle,
            self._sent(sends),
        )

    def _group(
        self, name: str, role: Role, style: Style, cut: Cut, sends: list[Collective]
    ) -> ModulePlan:
        """The plan of a module that is not cut itself, but whose children are."""
        kind = type(self._model.get_submodule(name)).__name__
        return ModulePlan(
            name, kind, role, style, (), cut.num_leaves, cut.idle_ranks(), self._sent(sends)
        )

    def _parameter(
        self,
        own: str,
        value: nn.Parameter,
        dim: int | None,
        cut: Cut | None,
        held: Held = None,
    ) -> ParameterPlan:
        by_rank = layouts(
            tuple(value.shape), self._degree, dim, cut if dim is not None else None, held
        )
        return ParameterPlan(own, value.dtype, by_rank)

    def _linear(self, name: str) -> nn.Linear:
        return self._model.get_submodule(name)  # type: ignore[return-value]  # has been checked

    def _cut(self, size: int) -> Cut:
        return Cut(size, self._scheme.leaves, self._degree)

    def _summed(self, cut: Cut) -> Cut | None:
        """The cut whose tree adds up the sum; None if the transport adds in its own order."""
        return cut if self._scheme.is_invariant else None

    def _input_gradient(self, width: int, dtype: torch.dtype, cut: Cut) -> Collective:
        return Collective(
            "all_reduce", "backward", "input gradient", dtype, width, cut=self._summed(cut)
        )

    def _outputs(self, linear: nn.Linear, cut: Cut) -> Collective:
        width, dtype = linear.out_features, linear.weight.dtype
        return Collective("all_reduce", "forward", "outputs", dtype, width, cut=self._summed(cut))

    def _sent(self, sends: list[Collective]) -> tuple[Collective, ...]:
        """The collectives, or none at degree 1, where nothing is counted."""
        return tuple(sends) if self._degree > 1 else ()


def _gather(
    direction: Direction,
    what: str,
    dtype: torch.dtype,
    parts: tuple[int, ...],
    when: When = "always",
) -> Collective:
    return Collective(
        "all_gather",
        direction,
        what,
        dtype,
        sum(parts),
        parts=parts,
        of_logits=when != "always",
        when=when,
    )


def _of_logits(collective: Collective) -> Collective:
    return replace(collective, of_logits=True)


def _gathered_input(linear: nn.Linear, input_cut: Cut, summed: Cut | None) -> Iterator[Collective]:
    """Collectives of a column linear that gathers its input."""
    sizes, dtype = input_cut.sizes(), linear.weight.dtype
    yield _gather("forward", "input", dtype, sizes)
    yield Collective(
        "reduce_scatter", "backward", "input gradient", dtype, sum(sizes), cut=summed, parts=sizes
    )


def _without(held: tuple[range, ...]) -> tuple[int, ...]:
    return tuple(rank for rank, leaves in enumerate(held) if not leaves)
