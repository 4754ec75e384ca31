"""A plan as text and as data: what is cut, what a rank holds, and what a step would send."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from shardproof.cli.output import WIDE, PlainConsole, calls_text, ranges, shape, size, table
from shardproof.plans.collective import Counts
from shardproof.plans.model_plan import ModelPlan, describe
from shardproof.plans.module_plan import ModulePlan, Row
from shardproof.plans.plan_text import alike, pattern, together
from shardproof.plans.plan_text import listed as listed_names
from shardproof.plans.watched_plan import KINDS, Sent, WatchedPlan, shapes_in_words
from shardproof.units import Shared
from shardproof.watching import Family

_GROUPS = ("attention", "shared input")  # their children are named below them
_MOST_SHAPES = 4  # of one parameter, in a cell


@dataclass(frozen=True)
class ModelStep:
    """A plan, and the size of the step whose collectives are counted.

    Attributes:
        directory: as it was written.
        plan: of the model in it.
        batch, length: rows, and tokens of each.
    """

    directory: str
    plan: ModelPlan
    batch: int
    length: int

    def counts(self, rank: int = 0, module: str | None = None) -> Counts:
        """The collectives of one training step."""
        return self.plan.comm(batch=self.batch, length=self.length, rank=rank, module=module)

    def token_counts(self, rank: int = 0) -> Counts:
        """The collectives of one more generated token."""
        counts = self.plan.comm(batch=self.batch, length=1, labels=False, rank=rank)
        return {direction: kinds for direction, kinds in counts.items() if direction == "forward"}


def as_json(model_step: ModelStep) -> dict[str, Any]:
    """The plan as data, with the collectives of a step on every rank."""
    ranks = range(model_step.plan.degree)
    return {
        "directory": model_step.directory,
        **model_step.plan.as_dict(),
        "comm": {
            "batch": model_step.batch,
            "length": model_step.length,
            "step": [model_step.counts(rank) for rank in ranks],
            "token": [model_step.token_counts(rank) for rank in ranks],
        },
    }


def show_model(model_step: ModelStep, out: PlainConsole) -> None:
    """Print one line for each kind of layer, then the whole modules and the totals."""
    plan = model_step.plan
    out.heading(f"{plan.model} at degree {plan.degree}")
    out.show(Text(f"{model_step.directory}, {plan.scheme.leaves} leaves"))
    out.print()
    columns = ["module", "cut", "leaves", "weight", "on a rank", "step"]
    if out.width < WIDE:
        columns = [column for column in columns if column not in ("leaves", "weight")]
    grid = table(*columns, width=out.width, right=("leaves", "weight", "on a rank"))
    for column in (grid.columns[0], grid.columns[-1]):
        column.no_wrap = True  # names are searched for
    parent = ""
    for row in plan.rows:
        if row.first.is_cut:
            cells = _cells(row, parent, model_step)
            grid.add_row(*(cells[column] for column in columns))
            parent = row.names if row.first.role in _GROUPS else parent
    out.block(grid)
    for line in [*_whole(plan), *plan.totals(), *_steps(model_step)]:
        out.whole_line(line)


def _cells(row: Row, parent: str, model_step: ModelStep) -> dict[str, str]:
    """Column -> the text of its cell, for one kind of layer."""
    first, name = row.first, row.names
    if parent and name.startswith(f"{parent}."):
        name = f"  {name.removeprefix(f'{parent}.')}"
    return {
        "module": name,
        "cut": _how(first),
        "leaves": str(first.leaves),
        "weight": ", ".join(
            shape(each.shape) for each in first.parameters if each.name == "weight"
        ),
        "on a rank": _size(_largest(first)) if first.parameters else "",
        "step": "\n".join(
            f"{direction} {len(row.modules) * figures['calls']} {kind} "
            f"{size(len(row.modules) * figures['message_bytes'])}"
            for direction, kinds in sorted(
                model_step.counts(module=first.name).items(), reverse=True
            )
            for kind, figures in kinds.items()
        ),
    }


def _how(module: ModulePlan) -> str:
    """How a module is cut, in words, and the ranks that hold nothing of it."""
    if not module.idle:
        return describe(module)
    ranks = f"rank{'s' if len(module.idle) > 1 else ''}"
    return f"{describe(module)}; {ranks} {ranges(module.idle)} idle"


def _whole(plan: ModelPlan) -> list[str]:
    """The modules that every rank holds whole, a line for each reason."""
    reasons: dict[str, list[ModulePlan]] = {}
    for module in plan.modules:
        if not module.is_cut:
            reasons.setdefault(module.reason, []).append(module)
    return [
        f"whole on every rank ({reason}): {listed_names(module.name for module in modules)}"
        for reason, modules in reasons.items()
    ]


def _largest(module: ModulePlan) -> int:
    """Bytes on the rank that holds the most."""
    sizes_by_parameter = [
        parameter.held_bytes for parameter in module.parameters if not parameter.tied_to
    ]
    return max((sum(ranks) for ranks in zip(*sizes_by_parameter, strict=True)), default=0)


def _size(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes else "tied"


def _steps(model_step: ModelStep) -> list[str]:
    """The collectives of a training step and of a generated token, as lines."""
    what = f"a training step of {model_step.batch} x {model_step.length} tokens"
    if model_step.plan.degree == 1:
        return [f"{what} sends nothing: there is one rank"]
    return [
        f"{what}: {_directions(model_step.counts())}",
        f"a generated token of {model_step.batch} rows: {_directions(model_step.token_counts())}",
    ]


def _directions(counts: Counts) -> str:
    """All collectives, and the bytes that rank 0 sends."""
    sent = sum(figures["sent_bytes"] for kinds in counts.values() for figures in kinds.values())
    parts = [
        f"{direction} {calls_text(kinds)}"
        for direction, kinds in sorted(counts.items(), reverse=True)
    ]
    return f"{'; '.join(parts)}; rank 0 sends {size(sent)}"


@dataclass(frozen=True)
class FamilyGroup:
    """Families of layers that are alike.

    Attributes:
        families: all of them.
        parameters: for each parameter of the first its names in all, and the dim.
    """

    families: tuple[Family, ...]
    parameters: tuple[tuple[tuple[str, ...], int], ...]


def groups(plan: WatchedPlan) -> list[FamilyGroup]:
    """Groups of families whose names differ in numbers only."""
    alike_families: dict[object, list[Family]] = {}
    for family in plan.families:
        dims = tuple((pattern(name), dim, blocks) for (name, dim), blocks in family.dims.items())
        units = replace(family.units, name=pattern(family.units.name))
        alike_families.setdefault((family.kind, units, dims), []).append(family)
    return [
        FamilyGroup(
            tuple(families),
            tuple(
                (tuple(key[0] for key in keys), keys[0][1])
                for keys in zip(*(family.dims for family in families), strict=True)
            ),
        )
        for families in alike_families.values()
    ]


def show_watched(plan: WatchedPlan, source: str, out: PlainConsole) -> None:
    """Print each group of families with its parameters, then the totals."""
    out.heading(f"{plan.model} at degree {plan.degree}")
    out.show(Text(f"{source}, {plan.scheme.leaves} leaves, watched"))
    out.print()
    columns = ["parameter", "dim", "weight", "on a rank", "step"]
    if out.width < WIDE:
        columns = [column for column in columns if column not in ("dim", "weight")]
    grid = table(*columns, width=out.width, right=("dim",))
    grid.columns[0].no_wrap = True  # names are searched for
    left = list(plan.rehearsal.sent)
    for group in groups(plan):
        grid.add_row(Text(_head(group.families[0], plan), "bold"))
        for names, dim in merged(group.parameters):
            sent = _sent_by(names, left)
            left = [each for each in left if each not in sent]
            cells = {
                "parameter": f"  {listed_names(names)}",
                "dim": str(dim),
                "weight": shape(plan.shapes[names[0]]),
                "on a rank": _held(plan, names[0]),
                "step": "\n".join(sent_words(sent)),
            }
            grid.add_row(*(cells[column] for column in columns))
    out.block(grid)
    if left:
        words = ", ".join(f"{each} of {where}" for where, each in _elsewhere(left))
        out.whole_line(f"sent elsewhere: {words}")
    for line in plan.totals():
        out.whole_line(line)


def merged(parameters: Sequence[tuple[tuple[str, ...], int]]) -> Iterator[tuple[list[str], int]]:
    """Join parameters whose names differ in numbers only, such as those of experts."""
    firsts = {names[0]: (names, dim) for names, dim in parameters}
    for same in alike((name, dim) for name, (_, dim) in firsts.items()):
        yield [each for name in same for each in firsts[name][0]], firsts[same[0]][1]


def _head(family: Family, plan: WatchedPlan) -> str:
    """A family in words: units, leaves, idle ranks."""
    shared = Shared(family.units, plan.scheme.leaves, plan.degree)
    words = [f"{KINDS[family.kind]}: {family.units.count} units"]
    if family.units.needers:
        words.append(f"{len(family.units.needers)} shared")
    words.append(f"{shared.cut.num_leaves} leaves")
    idle = plan.idle.get(family.name, ())
    if idle:
        words.append(f"rank{'s' if idle[1:] else ''} {ranges(idle)} idle")
    return ", ".join(words)


def _held(plan: WatchedPlan, name: str) -> str:
    """The shapes on the ranks; of many, the largest and the smallest."""
    shapes = list(dict.fromkeys(plan.layout(name, rank).local_shape for rank in range(plan.degree)))
    if len(shapes) <= _MOST_SHAPES:
        return shapes_in_words(shapes)
    return f"{shape(max(shapes))} to {shape(min(shapes))}"


def _sent_by(names: Sequence[str], sent: Sequence[Sent]) -> list[Sent]:
    """Collectives that the modules of some parameters make, or the first of several together."""
    modules = {name.rpartition(".")[0] for name in names}
    return [each for each in sent if each.module.split(" + ")[0] in modules]


def sent_words(sent: Sequence[Sent]) -> list[str]:
    """Direction, number, kind and bytes of collectives, each kind once.

    >>> sent_words([Sent("forward", "all_reduce", name, 1, 2048) for name in ("a", "b")])
    ['forward 2 all_reduce 4.0 KiB']
    """
    kinds: dict[tuple[str, str], list[Sent]] = {}
    for each in sent:
        kinds.setdefault((each.direction, each.kind), []).append(each)
    return [
        f"{direction} {sum(each.calls for each in same)} {kind} "
        f"{size(sum(each.message_bytes for each in same))}"
        for (direction, kind), same in kinds.items()
    ]


def _elsewhere(sent: Sequence[Sent]) -> Iterator[tuple[str, str]]:
    """Collectives of modules without a cut parameter, equal ones joined."""
    kinds = {each.module: (each.direction, each.kind) for each in sent}
    for names in alike(kinds.items()):
        for words in sent_words([each for each in sent if each.module in names]):
            yield together(names), words
