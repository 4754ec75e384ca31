"""A plan as a tree of modules with a bar for each parameter: what a page draws. Plain data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from shardproof.block_layout import BlockLayout
from shardproof.leaves import Layout
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.module_plan import ModulePlan
from shardproof.plans.plan_text import size, spans, starred
from shardproof.plans.watched_plan import KINDS, WatchedPlan

Run = tuple[int, int]  # first index and the one behind the last


@dataclass(frozen=True)
class Bar:
    """One parameter.

    Attributes:
        name: within its module.
        shape: of the whole.
        dim: that is cut; None where every rank holds the whole.
        how: it is cut, in words; or why it stays whole.
        owned: for each rank the runs of indices along the dim that it owns.
        copied: for each rank the runs that it holds and another owns.
        starts: where further blocks of a fused weight begin.
        held: for each rank the shape that it holds.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    how: str
    owned: tuple[tuple[Run, ...], ...] = ()
    copied: tuple[tuple[Run, ...], ...] = ()
    starts: tuple[int, ...] = ()
    held: tuple[tuple[int, ...], ...] = ()

    @property
    def idle(self) -> tuple[int, ...]:
        """Ranks that hold nothing of it."""
        return tuple(
            rank
            for rank, runs in enumerate(zip(self.owned, self.copied, strict=True))
            if not any(runs)
        )


@dataclass(frozen=True)
class ModuleNote:
    """A note beside a module.

    Attributes:
        kind: "forward", "backward" or "bad".
        words: collectives, or what is gathered or not invariant.
    """

    kind: str
    words: str


@dataclass(frozen=True)
class Node:
    """A module, or several that are alike.

    Attributes:
        name: the last part of its name, or of theirs, as spans.
        count: how many.
        bars: its own parameters.
        notes: what it sends, in each of those that are alike.
        children: in the order of the model.
    """

    name: str
    count: int = 1
    bars: tuple[Bar, ...] = ()
    notes: tuple[ModuleNote, ...] = ()
    children: tuple["Node", ...] = ()


@dataclass
class _Growing:
    bars: list[Bar] = field(default_factory=list)
    notes: list[ModuleNote] = field(default_factory=list)
    children: dict[str, "_Growing"] = field(default_factory=dict)

    def at(self, name: str) -> "_Growing":
        """The node of a module; it is made if it is missing."""
        node = self
        for segment in name.split(".") if name else ():
            node = node.children.setdefault(segment, _Growing())
        return node


def tree_of(plan: ModelPlan | WatchedPlan, *, batch: int, length: int) -> Node:
    """The model's tree; layers that are alike are one node.

    Args:
        plan: the plan.
        batch: rows of a step; of a watched plan the inputs say it.
        length: tokens of a row.
    """
    root = _Growing()
    if isinstance(plan, WatchedPlan):
        _grow_watched(root, plan)
    else:
        for module in plan.modules:
            _grow_module(root.at(module.name), module, plan, batch, length)
    return _node("", root)


def _grow_watched(root: _Growing, plan: WatchedPlan) -> None:
    kinds = {name: family.kind for family in plan.families for name, _ in family.dims}
    for name, shape in plan.shapes.items():
        module, _, own = name.rpartition(".")
        if name in plan.cuts:
            layouts = [plan.layout(name, rank) for rank in range(plan.degree)]
            bar = _bar(own, KINDS[kinds[name]], layouts)
        else:
            bar = Bar(own, shape, None, plan.whole.get(name, ""))
        root.at(module).bars.append(bar)
    module_names = set(_modules(plan.shapes))
    for sent in plan.rehearsal.sent:
        modules = sent.module.split(" + ")  # layers that read one input make one collective
        where = modules[0] if modules[1:] == [] else _parent(modules)
        of = [name.removeprefix(f"{where}.") for name in modules if name != where]
        if where not in module_names:  # tied, or a function
            where, of = "", modules
        words = f"{sent.calls} {sent.kind} {size(sent.message_bytes)}"
        words += f" of {', '.join(of)}" if any(of) else ""
        root.at(where).notes.append(ModuleNote(sent.direction, words))
    for operation, module, count in plan.rehearsal.gathered:
        root.at(module).notes.append(
            ModuleNote("bad", f"gathered inside: {operation}, {count} a step")
        )
    for operation, module in plan.rehearsal.variant:
        root.at(module).notes.append(ModuleNote("bad", f"not invariant: {operation}"))


def _modules(names: Iterable[str]) -> Iterable[str]:
    """Every module on the way to a parameter."""
    for name in names:
        segments = name.split(".")
        for end in range(len(segments)):
            yield ".".join(segments[:end])


def _parent(names: Sequence[str]) -> str:
    """The innermost module that contains all given modules."""
    segments = [name.split(".") for name in names]
    return ".".join(column[0] for column in takewhile(_is_one, zip(*segments, strict=False)))


def _is_one(column: Sequence[str]) -> bool:
    return len(set(column)) == 1


def _grow_module(
    node: _Growing, module: ModulePlan, plan: ModelPlan, batch: int, length: int
) -> None:
    for parameter in module.parameters:
        if parameter.tied_to:
            node.bars.append(
                Bar(parameter.name, parameter.shape, None, f"it is {parameter.tied_to}")
            )
        elif parameter.is_cut:
            node.bars.append(_bar(parameter.name, str(module.role), parameter.layouts))
        else:
            why = module.reason or "every rank needs all of it"
            node.bars.append(Bar(parameter.name, parameter.shape, None, why))
    counts = plan.comm(batch=batch, length=length, module=module.name)
    for direction, kinds in sorted(counts.items(), reverse=True):
        for kind, each in kinds.items():
            words = f"{each['calls']} {kind} {size(each['message_bytes'])}"
            node.notes.append(ModuleNote(direction, words))


def _bar(name: str, how: str, layouts: Sequence[Layout]) -> Bar:
    first = layouts[0]
    owned = tuple(_joined(layout.owned_runs) for layout in layouts)
    copied = tuple(
        _without(_joined(layout.held_runs), own) for layout, own in zip(layouts, owned, strict=True)
    )
    starts = tuple(_starts(first)) if isinstance(first, BlockLayout) else ()
    shapes = tuple(layout.local_shape for layout in layouts)
    return Bar(name, first.shape, first.dim, how, owned, copied, starts, shapes)


def _starts(layout: BlockLayout) -> Iterator[int]:
    """The indices at which further blocks begin, and shared units within a block."""
    count, end = layout.along.shared.units.count, 0
    for block in layout.along.blocks:
        if end:
            yield end
        own = (count - block.first) * block.unit  # indices before the shared units
        if 0 < own < block.size:
            yield end + own
        end += block.size


def _joined(runs: Iterable[range]) -> tuple[Run, ...]:
    """Join runs that touch."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1][1] == run.start:
            joined[-1] = (joined[-1][0], run.stop)
        elif len(run):
            joined.append((run.start, run.stop))
    return tuple(joined)


def _without(runs: Sequence[Run], others: Sequence[Run]) -> tuple[Run, ...]:
    """The parts of runs that are not in `others`."""
    left = []
    for start, stop in runs:
        for own_start, own_stop in others:
            if own_stop <= start or own_start >= stop:
                continue
            if start < own_start:
                left.append((start, own_start))
            start = own_stop
        if start < stop:
            left.append((start, stop))
    return tuple(left)


def _node(name: str, grown: _Growing) -> Node:
    children = {child: _node(child, each) for child, each in grown.children.items()}
    groups: dict[object, list[str]] = {}
    for child, node in children.items():
        key = _likeness(node) if child.isdigit() else child
        groups.setdefault(key, []).append(child)
    folded = tuple(_folded([children[child] for child in names]) for names in groups.values())
    node = Node(name, 1, tuple(grown.bars), tuple(grown.notes), folded)
    only = folded[0] if len(folded) == 1 else None
    if name and only is not None and only.count == 1 and not node.bars and not node.notes:
        return replace(only, name=f"{name}.{only.name}")
    return node


def _folded(alike: Sequence[Node]) -> Node:
    """Fold equal nodes into one."""
    if len(alike) == 1:
        return alike[0]
    return replace(
        _likeness(alike[0]),
        name=spans(int(node.name.split(".")[0]) for node in alike) + _tail(alike[0]),
        count=len(alike),
    )


def _tail(node: Node) -> str:
    _, dot, rest = node.name.partition(".")
    return dot + rest


def _likeness(node: Node) -> Node:
    """The node without its number and the numbers in reasons, for comparing nodes."""
    is_number = node.name.split(".")[0].isdigit()
    return _with_starred_reasons(replace(node, name=f"*{_tail(node)}") if is_number else node)


def _with_starred_reasons(node: Node) -> Node:
    """The node and its children, with stars in place of the numbers in reasons."""
    return replace(
        node,
        bars=tuple(replace(bar, how=starred(bar.how)) for bar in node.bars),
        children=tuple(_with_starred_reasons(child) for child in node.children),
    )


def num_parameters(node: Node) -> Mapping[str, int]:
    """The numbers of cut and of whole parameters in a node and below it."""
    cut = sum(bar.dim is not None for bar in node.bars)
    whole = len(node.bars) - cut
    for child in node.children:
        inside = num_parameters(child)
        cut, whole = cut + inside["cut"], whole + inside["whole"]
    return {"cut": cut * node.count, "whole": whole * node.count}
