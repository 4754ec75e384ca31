"""`WatchedPlan`: a plan that was found by watching one forward of a model. Plain data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from shardproof.block_layout import cut_layout
from shardproof.leaves import Layout
from shardproof.plans.collective import Counts
from shardproof.plans.plan_text import (
    TOKENS_CUT,
    alike,
    by_reason,
    columns,
    listed,
    parameters_line,
    pattern,
    size,
    together,
)
from shardproof.scheme import Scheme
from shardproof.units import CutDim, Shared, Units
from shardproof.watching import Family
from shardproof.wording import dtype_name

KINDS = {
    "pair": "column and row",
    "pair with sums": "column and row, sums between",
    "vocabulary": "vocabulary",
    "gathered": "column, output gathered",
    "row": "row, whole input",
}


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind that one module makes in a step, the same on every rank.

    Attributes:
        direction: "forward" or "backward".
        kind: "all_reduce", "all_gather", ...
        module: the module, or function, that makes them.
        calls: number of collectives.
        message_bytes: bytes of their results, summed.
    """

    direction: str
    kind: str
    module: str
    calls: int
    message_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    """What one step of the cut model did on each rank, rehearsed without the other ranks.

    Attributes:
        device: "meta", or "cpu" where the forward depends on data.
        ranks: the ledger of every rank after the step, forward and backward.
        gathered: (operation, module whose weight the tensor comes from, count): tensors that were
            gathered because the operation has no rule for cut tensors.
        variant: (operation, module): operations that have no invariant form.
        calls: modules whose own code calls, on whole tensors, operations that have an invariant
            form.
        draws: modules whose own code draws random numbers.
        sent: the collectives by module, in the order in which they were made.
        whole_weights: (weight, operation): cut weights that an operation needs whole. Such a weight
            must not be cut.
    """

    device: str
    ranks: tuple[Counts, ...]
    gathered: tuple[tuple[str, str, int], ...] = ()
    variant: tuple[tuple[str, str], ...] = ()
    calls: frozenset[str] = frozenset()
    draws: frozenset[str] = frozenset()
    sent: tuple[Sent, ...] = ()
    whole_weights: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class WatchedPlan:
    """How a model is cut among `degree` ranks, as found by watching one forward.

    Attributes:
        model: name of the model's class.

        degree: number of ranks.
        scheme: leaves, numerics, seed.
        families: groups of parameter dims that are cut together, each with its units.
        whole: name of each parameter that is not cut -> a sentence that says why.
        shapes: name -> shape of every parameter; tied parameters once.

        dtypes: name -> dtype, likewise.
        rehearsal: one step of the cut model, forward and backward, with the given inputs.
        notes: what a reader should know.
        sequence_parallel: activations between blocks are cut along their tokens.
    """

    model: str
    degree: int
    scheme: Scheme
    families: tuple[Family, ...]
    whole: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    rehearsal: Rehearsal
    notes: tuple[str, ...] = field(default=())
    sequence_parallel: bool = False

    @cached_property
    def cuts(self) -> dict[str, tuple[int, CutDim]]:
        """Parameter -> the dim that is cut, and how.

        Layers with equal units have one `Shared` object, whose caches then serve all of them.
        """
        cuts: dict[str, tuple[int, CutDim]] = {}
        shared_by_units: dict[tuple[str, Units], Shared] = {}
        for family in self.families:
            key = pattern(family.units.name), replace(family.units, name="")
            if key not in shared_by_units:
                shared_by_units[key] = Shared(family.units, self.scheme.leaves, self.degree)
            shared = shared_by_units[key]
            for (name, dim), blocks in family.dims.items():
                cuts[name] = (dim, CutDim(shared, tuple(blocks)))
        return cuts

    def layouts(self, rank: int) -> dict[str, Layout]:
        """The layout of every cut parameter on a rank."""
        return {
            name: cut_layout(self.shapes[name], rank, dim=dim, along=along)
            for name, (dim, along) in self.cuts.items()
        }

    @cached_property
    def held_bytes(self) -> tuple[int, ...]:
        """Bytes of parameters that each rank holds."""
        return tuple(
            self.whole_bytes
            + sum(
                _numel(layout.local_shape) * self.dtypes[name].itemsize
                for name, layout in self.layouts(rank).items()
            )
            for rank in range(self.degree)
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of the parameters of the whole model."""
        return sum(_numel(self.shapes[name]) * self.dtypes[name].itemsize for name in self.shapes)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the parameters that every rank holds whole."""
        return sum(
            _numel(self.shapes[name]) * self.dtypes[name].itemsize
            for name in self.shapes
            if name not in self.cuts
        )

    @property
    def share(self) -> float:
        """The fraction of the parameters' bytes that is cut."""
        return 1 - self.whole_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def matrix_share(self) -> float:
        """The fraction of the elements of parameters with two or more dims that is cut."""
        sizes = {name: _numel(shape) for name, shape in self.shapes.items() if len(shape) > 1}
        cut = sum(size for name, size in sizes.items() if name in self.cuts)
        return cut / max(sum(sizes.values()), 1)

    @cached_property
    def idle(self) -> dict[str, tuple[int, ...]]:
        """Family -> ranks that own nothing of it."""
        idle = {}
        for family in self.families:
            shared = Shared(family.units, self.scheme.leaves, self.degree)
            ranks = tuple(rank for rank in range(self.degree) if not shared.owned(rank))
            if ranks:
                idle[family.name] = ranks
        return idle

    def comm(self, *, rank: int = 0) -> Counts:
        """What the ledger of a rank counts in one step with the inputs that were given.

        Args:
            rank: the rank.

        Returns:
            Direction -> collective -> calls, message_bytes, sent_bytes, as
            `axis.transport.ledger.as_dict()` has them.
        """
        return self.rehearsal.ranks[rank]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": self.model,
            "degree": self.degree,
            "scheme": asdict(self.scheme),
            "sequence_parallel": self.sequence_parallel,
            "share_cut": self.share,
            "total_bytes": self.total_bytes,
            "whole_bytes": self.whole_bytes,
            "held_bytes": list(self.held_bytes),
            "families": [self._family(family) for family in self.families],
            "whole": dict(self.whole),
            "gathered": [list(each) for each in self.rehearsal.gathered],
            "not_invariant": [list(each) for each in self.rehearsal.variant],
            "comm": list(self.rehearsal.ranks),
            "collectives": [asdict(each) for each in self.rehearsal.sent],
            "notes": list(self.notes),
        }

    def _family(self, family: Family) -> dict[str, Any]:
        return {
            "name": family.name,
            "kind": family.kind,
            "units": family.units.count,
            "shared_units": len(family.units.needers),
            "idle_ranks": list(self.idle.get(family.name, ())),
            "parameters": [
                {
                    "name": name,
                    "dim": dim,
                    "shape": list(self.shapes[name]),
                    "dtype": dtype_name(self.dtypes[name]),
                    "blocks": [[each.size, each.first, each.unit] for each in blocks],
                    "ranks": [
                        {
                            "shape": list(layout.local_shape),
                            "owned": [[run.start, run.stop] for run in layout.owned_runs],
                            "held": [[run.start, run.stop] for run in layout.held_runs],
                        }
                        for layout in (self.layout(name, rank) for rank in range(self.degree))
                    ],
                }
                for (name, dim), blocks in family.dims.items()
            ],
        }

    def layout(self, name: str, rank: int) -> Layout:
        """The layout of one cut parameter on a rank."""
        dim, along = self.cuts[name]
        return cut_layout(self.shapes[name], rank, dim=dim, along=along)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Names, cut, units and shapes by rank; repeated layers share one row."""
        keyed = {}
        for family in self.families:
            for (name, dim), _ in family.dims.items():
                held = tuple(self.layout(name, rank).local_shape for rank in range(self.degree))
                keyed[name] = (KINDS[family.kind], dim, _units(family), held)
        return [
            (together(names), f"{kind}, dim {dim}", units, shapes_in_words(held))
            for names in alike(keyed.items())
            for kind, dim, units, held in [keyed[names[0]]]
        ]

    def __str__(self) -> str:
        """One line for every kind of parameter, then the totals, what is whole, and the notes."""
        table = [("parameter", "cut", "units", "held by the ranks"), *self.rows()]
        head = f"{self.model} at degree {self.degree}"
        return "\n".join([head, *columns(table), *self.totals()])

    def totals(self) -> list[str]:
        """Lines of text: the totals, what stays whole and why, and the collectives of a step."""
        return [
            parameters_line(self.total_bytes, self.share, self.held_bytes, self.whole_bytes),
            *[TOKENS_CUT] * self.sequence_parallel,
            *(f"whole on every rank: {names}: {why}" for names, why in by_reason(self.whole)),
            *self._steps(),
            *(f"note: {note}" for note in self.notes),
        ]

    def _steps(self) -> Iterator[str]:
        for direction in ("forward", "backward"):
            kinds = self.comm().get(direction, {})
            if kinds:
                counts = ", ".join(
                    f"{each['calls']} {kind} of {size(each['message_bytes'])}"
                    for kind, each in kinds.items()
                )
                yield f"a step with these inputs, {direction}: {counts}"
        yield from inside_lines(self.rehearsal)
        ranks: dict[tuple[int, ...], list[str]] = {}
        for name, idle in self.idle.items():
            ranks.setdefault(idle, []).append(name.rpartition(".")[0])
        for idle, names in ranks.items():
            owners = (
                f"rank {idle[0]} owns"
                if len(idle) == 1
                else f"ranks {', '.join(map(str, idle))} own"
            )
            yield f"idle: {owners} nothing of {listed(names)}, and what is cut with it"


def inside_lines(rehearsal: Rehearsal) -> Iterator[str]:
    """One line for each operation that gathers for want of a rule, or that is not invariant.

    Args:
        rehearsal: of a step of the cut model.
    """
    for operation, places in _by_operation(rehearsal.gathered):
        where = listed(module or "an input" for module, _ in places)
        yield f"gathered inside: {operation} of {where}, {sum(n for _, n in places)} a step"
    for operation, places in _by_operation((*each, 1) for each in rehearsal.variant):
        where = listed(module for module, _ in places if module)
        yield (
            f"not invariant: {operation}{f' in {where}' if where else ''} has no form whose "
            "bits no cut changes"
        )


def _by_operation(
    items: Iterable[tuple[str, str, int]],
) -> Iterable[tuple[str, list[tuple[str, int]]]]:
    """Operation -> modules and counts."""
    places: dict[str, list[tuple[str, int]]] = {}
    for operation, module, count in items:
        places.setdefault(operation, []).append((module, count))
    return places.items()


def shapes_in_words(shapes: Sequence[tuple[int, ...]]) -> str:
    """The shapes on the ranks, each different one once."""
    return " | ".join("x".join(map(str, shape)) for shape in dict.fromkeys(shapes))


def _units(family: Family) -> str:
    shared = len(family.units.needers)
    return f"{family.units.count}" + (f" and {shared} shared" if shared else "")


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
