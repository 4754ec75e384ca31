"""Traces for people: the table of one rank, and the timeline of all."""

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest

from rich.table import Table
from rich.text import Text

from shardproof.trace.step import Part, TraceStep
from shardproof.tree import node_name

COLOURS = {"forward": "cyan", "backward": "magenta", "update": "green"}

Row = tuple[TraceStep | None, ...]
Key = tuple[str, str, str]


def aligned(ranks: Sequence[Sequence[TraceStep]]) -> list[Row]:
    """The steps of all ranks side by side: a row has one step of each rank, or None.

    Ranks meet in collectives, which share a row; between two of them, steps stand in their order.
    """
    rows: list[Row] = []
    parts = [list(_between_meetings(steps)) for steps in ranks]
    for sections in zip_longest(*parts, fillvalue=()):
        rows.extend(_side_by_side(sections))
    return rows


def _side_by_side(sections: Sequence[Sequence[TraceStep]]) -> list[Row]:
    """Steps of the same module and operation share a row; a rank may have one that others lack."""
    if len({tuple(map(_key, section)) for section in sections}) == 1:
        return list(zip(*sections, strict=True))
    rows: list[list[TraceStep | None]] = []
    keys: list[Key] = []
    for place, section in enumerate(sections):
        before = [None] * place
        matcher = SequenceMatcher(None, keys, [_key(step) for step in section], autojunk=False)
        merged: list[list[TraceStep | None]] = []
        for tag, start, stop, first, last in matcher.get_opcodes():
            if tag == "equal":
                both = zip(rows[start:stop], section[first:last], strict=True)
                merged += [[*row, step] for row, step in both]
                continue
            merged += [[*row, None] for row in rows[start:stop]]
            merged += [[*before, step] for step in section[first:last]]
        rows = merged
        keys = [_key(next(step for step in row if step is not None)) for row in rows]
    return [tuple(row) for row in rows]


def _key(step: TraceStep) -> Key:
    return step.phase, step.module, step.operation


def _between_meetings(steps: Sequence[TraceStep]) -> Iterator[list[TraceStep]]:
    """Split steps into sections; each collective is a section of its own."""
    section: list[TraceStep] = []
    for step in steps:
        if step.is_collective:
            yield section
            yield [step]
            section = []
        else:
            section.append(step)
    yield section


def table(steps: Sequence[TraceStep]) -> Table:
    """The steps of one rank."""
    grid = Table(title=f"rank {steps[0].rank}" if steps else None, box=None, pad_edge=False)
    grid.add_column("step", justify="right")
    for name in ("phase", "module"):
        grid.add_column(name, no_wrap=True)
    grid.add_column("operation", ratio=2)
    grid.add_column("tensors", ratio=3)
    for name in ("sent", "held"):
        grid.add_column(f"bytes {name}", justify="right", no_wrap=True)
    for step in steps:
        inputs = ", ".join(map(described, step.inputs))
        result = "" if step.output is None else described(step.output)
        grid.add_row(
            str(step.number),
            Text(step.phase, COLOURS.get(step.phase, "")),
            Text(step.module),
            Text(_what(step), "bold" if step.is_collective else ""),
            Text(" -> ".join(filter(None, (inputs, result)))),
            f"{step.sent_bytes:,}" if step.is_collective else "",
            f"{step.held_bytes:,}",
        )
    return grid


def timeline(ranks: Sequence[Sequence[TraceStep]]) -> Table:
    """All ranks: a row for each step, and a column for what each rank gets from it.

    Arrows stand where the ranks meet.
    """
    grid = Table(box=None, pad_edge=False)
    for name in ("phase", "module", "step"):
        grid.add_column(name, overflow="fold")
    for rank in range(len(ranks)):
        grid.add_column(f"rank {rank}", overflow="fold")
    for row in aligned(ranks):
        steps = [step for step in row if step is not None]
        first, style = steps[0], "bold" if steps[0].is_collective else ""
        formula = _shared([_formula(step) for step in steps])
        cells = [Text("" if step is None else _cell(step, formula), style) for step in row]
        if first.is_collective and len(ranks) > 1:
            for place, cell in enumerate(cells):
                ends = (place > 0, place < len(cells) - 1)
                cells[place] = Text.assemble("<-- " * ends[0], cell, " -->" * ends[1])
        phase = Text(first.phase, COLOURS.get(first.phase, ""))
        grid.add_row(phase, Text(first.module), Text(formula, style), *cells)
    return grid


def _shared(texts: Sequence[str]) -> str:
    """The text that all have; "" if they differ."""
    return texts[0] if len(set(texts)) == 1 else ""


def _cell(step: TraceStep, formula: str) -> str:
    """The result of one rank, with its formula if the ranks have different ones."""
    own = "" if formula == _formula(step) else _formula(step)
    if step.is_collective:
        result = f"sends {step.sent_bytes:,} bytes"
    else:
        result = "" if step.output is None else _result(step, step.output)
    return ": ".join(filter(None, (own, result)))


def _formula(step: TraceStep) -> str:
    """What ranks do alike: a collective and its result, a product without the leaves it sums."""
    if step.is_collective:
        result = "" if step.output is None else f" of {step.output.name} {step.output.shape}"
        return step.operation + result
    leaves = _leaves(step.output)
    detail = step.detail.removesuffix(f", {leaves}") if leaves else step.detail
    return detail if " = " in detail else ": ".join(filter(None, (step.operation, detail)))


def _result(step: TraceStep, output: Part) -> str:
    """Name or leaves of a result, unless the formula names it, and its shape."""
    leaves = _leaves(output)
    name = output.name.removesuffix(f", {leaves}")
    is_said = name == step.module or _formula(step).startswith(f"{name} = ")
    cells = ("" if is_said else name, leaves, str(output.shape), output.placement)
    return " ".join(filter(None, cells))


def _leaves(output: Part | None) -> str:
    """The leaves that a partial sum adds; "" for other tensors."""
    return "" if output is None or output.node is None else node_name(output.node)


def _what(step: TraceStep) -> str:
    return f"{step.operation}: {step.detail}" if step.detail else step.operation


def described(part: Part) -> str:
    """Name, shape and placement of a tensor.

    >>> described(Part("x", (4, 2), "float32", "Shard(1)"))
    'x (4, 2) Shard(1)'
    """
    return " ".join(filter(None, (part.name, str(part.shape), part.placement)))
