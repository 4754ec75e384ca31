"""Compare a plan by names with one watched forward.

A layer that is cut by name passes a rank's part on as a plain tensor to the model's own code. That
is right only where the code does to a part what it does to the whole. The watched forward tells
which features belong together, which operations use several of them, and which parameters have an
entry for each. Whatever would give other numbers is one sentence here. Where numbers are right, but
the bits of a function of torch would depend on the cut, the function is computed by its form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import nn

from shardproof.numerics import forms
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.module_plan import ModulePlan, ParameterPlan
from shardproof.plans.style import Attention, ColumnParallel, RowParallel
from shardproof.units import Block
from shardproof.watching import Event, Family, Watched, obstacle
from shardproof.watching.atoms import distinct

WAY_OUT = (
    "Correct the plan; or give None in its place and an example of what forward takes (inputs=): "
    "then the model is cut by what one forward shows, whatever its code does."
)
_DROPOUTS = nn.modules.dropout._DropoutNd  # `parallelize` replaces them, or refuses them
_NEEDS_WHOLE = ("gather", "sum", "weight")


@dataclass(frozen=True)
class _Entry:
    """One dim of a parameter that the plan cuts.

    Attributes:
        module: the plan of its module.
        parameter: the plan of the parameter.
        passes_parts: the module gives or takes a rank's part: its neighbours see a cut tensor.
    """

    module: ModulePlan
    parameter: ParameterPlan
    passes_parts: bool


@dataclass(frozen=True)
class Comparison:
    """A plan by names and one forward.

    Attributes:
        cut: names of parameters that the plan cuts.
        problems: what would be wrong with the cut model, one sentence each.
        calls: modules whose own code calls, on what the plan cuts, what has a form.
        draws: modules whose own code draws.
    """

    cut: frozenset[str]
    problems: tuple[str, ...]
    calls: frozenset[str]
    draws: frozenset[str]


def compare(
    made: ModelPlan, watched: Watched, found: Sequence[Family], model: nn.Module
) -> Comparison:
    """Compare a plan with a forward.

    Args:
        made: by names.
        watched: one forward of the model, with its parts.
        found: all its families.
        model: not cut.
    """
    dropouts = {name for name, each in model.named_modules() if isinstance(each, _DROPOUTS)}
    entries = _entries(made, watched)
    exempt = {module.name for module in made.modules if module.is_cut} | dropouts
    exempt |= _attending(made, model)
    problems: dict[str, None] = {}
    calls: set[str] = set()
    for family in found:
        keys = [key for key in (*family.dims, *family.whole) if key in entries]
        if any(entries[key].passes_parts for key in keys):
            problems |= dict.fromkeys(_problems(family, keys, entries, exempt))
            calls |= {e.module for e in family.local if e.what == "compute" and _has_form(e.op)}
    calls -= exempt
    problems |= dict.fromkeys(_used_elsewhere(entries, watched))
    problems |= dict.fromkeys(_constants(entries, watched))
    return Comparison(
        frozenset(name for name, _ in entries),
        tuple(problems),
        frozenset(calls) if made.scheme.is_invariant else frozenset(),
        frozenset(watched.record.draws - exempt),
    )


def _attending(made: ModelPlan, model: nn.Module) -> set[str]:
    """Children that attend and are replaced by ours, and the modules inside them."""
    children = [
        f"{name}.{style.attend}" if name else style.attend
        for name, style in made.styles.items()
        if isinstance(style, Attention) and style.attend is not None
    ]
    return {
        name
        for name, _ in model.named_modules()
        if any(f"{name}.".startswith(f"{child}.") for child in children)
    }


@cache
def _named_forms() -> frozenset[str]:
    return frozenset(each.__name__.strip("_") for each in forms.all_forms())


def _has_form(op: str) -> bool:
    """Whether an operation of ATen comes from a function of torch that has a form."""
    op = op.strip("_")
    return op in _named_forms() or op.startswith(("scaled_dot_product", "log_sigmoid", "native"))


def _entries(made: ModelPlan, watched: Watched) -> dict[tuple[str, int], _Entry]:
    found: dict[tuple[str, int], _Entry] = {}
    for module in made.modules:
        for parameter in module.parameters:
            dim = parameter.layouts[0].dim
            if dim is not None:
                full = f"{module.name}.{parameter.name}" if module.name else parameter.name
                key = watched.tied.get(full, full), dim
                passes_parts = _passes_parts(module, made.head)
                if key in found:  # tied
                    passes_parts = passes_parts or found[key].passes_parts
                found[key] = _Entry(module, parameter, passes_parts)
    return found


def _passes_parts(module: ModulePlan, head: str | None) -> bool:
    """Whether what the module gives or takes is a rank's part."""
    style = module.style
    if module.role == "column" and isinstance(style, ColumnParallel):
        return not style.gather_output and module.name != head
    if module.role == "row" and isinstance(style, RowParallel):
        return style.input_is_parallel
    return module.role in ("column", "row", "query", "key", "value", "output")


Entries = dict[tuple[str, int], _Entry]


def _problems(
    family: Family,
    keys: Sequence[tuple[str, int]],
    entries: Entries,
    exempt: set[str],
) -> Iterator[str]:
    first = next(key for key in keys if entries[key].passes_parts)
    what = f"the features that {entries[first].module.name!r} cuts"
    for event in (*family.events, *family.local):
        if event.module not in exempt and (told := _sentence_about(event, what, family)):
            yield told
    is_blocked = any(event.what in _NEEDS_WHOLE for event in family.events)
    for name, dim in keys:
        if (name, dim) in family.whole or (family.units.count < 2 and not is_blocked):
            why = obstacle(family, name) or "every unit of this group uses all of it"
            yield f"dim {dim} of {name!r} cannot be cut: {why}."
            return
    gathering = {
        name.rpartition(".")[0]
        for (name, _), entry in entries.items()
        if isinstance(entry.module.style, ColumnParallel) and entry.module.style.gather_input
    }
    for name, dim in family.dims:
        if name.rpartition(".")[0] in gathering:
            continue  # its input is gathered
        if (name, dim) not in entries and _is_apart(family, name, dim):
            yield (
                f"{name!r} stays whole, and its dim {dim} has entries for each of {what}. Name its "
                "module in the plan too, or leave both out."
            )
    if (
        family.kind == "row"
        and not is_blocked
        and not any(_is_column(key, entries) for key in keys)
    ):
        yield (
            f"{first[0]!r} is cut along dim {first[1]}, and its input is whole on every "
            "rank. Use RowParallel(input_is_parallel=False), or cut the layer before."
        )
        return
    yield from _units_on_two_ranks(family, [key for key in keys if key in family.dims], entries)


def _is_column(key: tuple[str, int], entries: Entries) -> bool:
    return entries[key].module.role not in ("row", "output")


def _is_apart(family: Family, name: str, dim: int) -> bool:
    """Whether a dim has more than one unit, none of which every rank needs."""
    return any(block.first < family.units.count for block in family.dims[name, dim])


def _sentence_about(event: Event, what: str, family: Family) -> str:
    """What an operation does that it must not do to a part."""
    where = f"{event.op!r} in {event.module!r}" if event.module else f"{event.op!r} in the forward"
    if event.what in _NEEDS_WHOLE:
        does = "adds up over" if event.what == "sum" else "needs all of"
        return f"{where} {does} {what}, but a rank holds only some of them."
    if event.what == "draw":
        return (
            f"{where} draws random numbers for {what}: the ranks would draw different ones. Use an "
            "nn.Dropout."
        )
    if event.what == "spread" and not any(name == event.parameter for name, _ in family.dims):
        other = repr(event.parameter) if event.parameter else "an activation that is not cut"
        return (
            f"{where} uses {other} for each of {what}: each rank's gradient of it would count only "
            "that rank's features."
        )
    return ""


def _used_elsewhere(entries: Entries, watched: Watched) -> Iterator[str]:
    """Parameters that are cut and that code of another module reads."""
    names: dict[str, set[str]] = {name: {name} for name, _ in entries}
    for other, name in watched.tied.items():
        names.setdefault(name, {name}).add(other)
    for name, _ in entries:
        own = {each.rpartition(".")[0] for each in names[name]}
        for module in sorted(watched.record.used.get(name, set()) - own):
            where = repr(module) if module else "the model itself"
            yield f"{name!r} is cut, and the code of {where} uses it too, as if it were whole."


def _constants(entries: Entries, watched: Watched) -> Iterator[str]:
    """Tensors of the forward's own that have an element for each unit of what is cut."""
    roots = watched.record.atoms.roots
    cut = [roots(watched.labels[key]) for key, entry in entries.items() if entry.passes_parts]
    known = distinct(np.concatenate([np.zeros(0, dtype=np.int64), *cut]))
    for labels, op, module in watched.record.constants.values():
        units = roots(labels)
        is_apart = units != units[..., :1]
        if np.isin(units[is_apart], known).any():
            yield (
                f"{op!r} in {repr(module) if module else 'the forward'} uses a tensor with another "
                "element for each of the features that the plan cuts; a rank holds some of them."
            )


def _units_on_two_ranks(
    family: Family, keys: Sequence[tuple[str, int]], entries: Entries
) -> Iterator[str]:
    """Indices that belong together, which the plan gives to different ranks."""
    owner: dict[int, tuple[int, str]] = {}
    for name, dim in keys:
        units = _units(family.dims[name, dim])
        ranks = np.zeros(len(units), dtype=np.int64)
        for rank, layout in enumerate(entries[name, dim].parameter.layouts):
            for run in layout.owned_runs:
                ranks[run.start : run.stop] = rank
        for index, (unit, rank) in enumerate(zip(units.tolist(), ranks.tolist(), strict=True)):
            here = f"index {index} of dim {dim} of {name!r}"
            there = owner.setdefault(unit, (rank, here))
            if unit < family.units.count and there[0] != rank:
                yield (
                    f"{there[1]} and {here} belong together, and the plan gives them to rank "
                    f"{there[0]} and rank {rank}. The forward combines the two: one rank must hold "
                    "both."
                )
                return


def _units(blocks: Sequence[Block]) -> np.ndarray:
    """The unit of every index of a dim."""
    return np.concatenate([np.arange(block.size) // block.unit + block.first for block in blocks])
