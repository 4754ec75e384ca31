"""A view as lines of text: the matrices by owner, then the steps, with numbers if they are wanted.

Plain ASCII. Whose a cell is, its letter says as well as its colour.
"""

import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from shardproof.showing.arrows import MOST_ARROWS, arrow_sentences
from shardproof.showing.scenes import Scene, StepView
from shardproof.showing.sentences import placement_change
from shardproof.showing.tensors import EVERY_RANK, Grid, SceneTensor, grids_of, owners_of

RANK_STYLES = (
    "black on bright_cyan", "black on bright_yellow", "black on bright_green",
    "black on bright_magenta", "white on blue", "white on red", "black on white",
    "black on yellow",
)  # fmt: skip
PHASE_STYLES = {"forward": "bold cyan", "backward": "bold magenta", "update": "bold green"}
EVERY_LETTER, SUMMAND_LETTER, UNKNOWN_LETTER = "*", "+", "?"
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"

MAP_ROWS, MAP_COLUMNS = 6, 16  # of a small grid
VALUE_ROWS, VALUE_COLUMNS = 6, 8  # of a grid of numbers
_CELL = 9
# A name of a user's may have characters that steer a terminal.
_CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "?")
_GAP = 3
_MOST_MAPS = 12
INDENT = 5  # below the number of a step
_MARGIN = " " * INDENT


def lines_of(view: StepView, *, values: bool, width: int) -> list[Text]:
    """The whole text, as lines not wider than `width`.

    Args:
        view: what is shown.
        values: show numbers.
        width: columns, 40 or more.
    """
    lines = [Text(f"== {view.title}", "bold")]
    lines += _wrapped(" ".join(view.about), width)
    lines += [Text(""), *_legend(view, values, width), Text("")]
    matrices = _matrices(view)
    lines += _maps(matrices[:_MOST_MAPS], width)
    if len(matrices) > _MOST_MAPS:
        left_out = f"{len(matrices) - _MOST_MAPS} more tensors of the forward are not drawn here."
        lines += [Text(""), *_wrapped(left_out, width)]
    phase = ""
    for scene in view.scenes:
        if scene.phase != phase:
            phase = scene.phase
            lines += [Text(""), Text(f"== {phase}", PHASE_STYLES.get(phase, "bold"))]
        lines += _scene(scene, view, values, width)
    lines.append(Text(""))
    for sentence in (_memory(view), *view.omissions):
        lines += _wrapped(sentence, width)
    for line in lines:
        line.rstrip()
        line.plain = line.plain.translate(_CONTROL)
        line.truncate(width)  # a name of a user's may be longer than any line
    return lines


def style_of(rank: int | None) -> str:
    """The colour of a rank; there are eight colours, and further ranks repeat them."""
    return "" if rank is None else RANK_STYLES[rank % len(RANK_STYLES)]


def letter_of(rank: int) -> str:
    """One letter for a rank.

    >>> letter_of(3), letter_of(11)
    ('3', 'b')
    """
    return LETTERS[rank % len(LETTERS)]


def _legend(view: StepView, values: bool, width: int) -> list[Text]:
    parts = [
        Text.assemble((letter_of(rank), style_of(rank)), f" rank {rank}")
        for rank in range(view.degree)
    ]
    parts += [
        Text(f"{EVERY_LETTER} the same on every rank"),
        Text(f"{SUMMAND_LETTER} a summand on each rank"),
        Text(f"{UNKNOWN_LETTER} not known"),
    ]
    if values and view.has_values:
        parts.append(Text("1:5 index 5, which rank 1 holds"))
    lines = [Text("")]
    for part in parts:
        if lines[-1].cell_len and lines[-1].cell_len + 3 + part.cell_len > width:
            lines.append(Text(""))
        lines[-1] = Text("   ").join([lines[-1], part]) if lines[-1].cell_len else part
    return lines


def _matrices(view: StepView) -> list[tuple[str, SceneTensor]]:
    """The tensors that a reader wants to see first: what each forward product reads and makes."""
    matrices: dict[tuple[str, str, tuple[int, ...]], tuple[str, SceneTensor]] = {}
    for scene in view.scenes:
        if scene.phase != "forward":
            continue
        who = scene.title.partition(":")[0]
        for tensor in scene.tensors:
            is_repeated = scene.is_collective and not tensor.is_result
            if len(tensor.shape) >= 2 and not is_repeated:
                # Weights are called alike in every layer, and the layer tells them apart.
                name = f"{who}.{tensor.name}" if ":" in scene.title else tensor.name
                matrices.setdefault((name, tensor.placement, tensor.shape), (name, tensor))
    return list(matrices.values())


def _maps(tensors: Sequence[tuple[str, SceneTensor]], width: int) -> list[Text]:
    """Small grids side by side, as many as fit in a line."""
    lines: list[Text] = []
    row: list[list[Text]] = []
    for name, tensor in tensors:
        block = [Text(name, "bold"), Text(_shape(tensor)), *_map(tensor)]
        row_width = sum(_width(each) + _GAP for each in row)
        if row and row_width + _width(block) > width:
            lines += [*_joined(row), Text("")]
            row = []
        row.append(block)
    return lines + (_joined(row) if row else [])


def _width(block: Sequence[Text]) -> int:
    return max(line.cell_len for line in block)


def _joined(blocks: Sequence[Sequence[Text]]) -> list[Text]:
    lines = []
    for place in range(max(len(block) for block in blocks)):
        line = Text("")
        for block in blocks:
            part = block[place].copy() if place < len(block) else Text("")
            part.pad_right(_width(block) + _GAP - part.cell_len)
            line += part
        line.rstrip()
        lines.append(line)
    return lines


def _map(tensor: SceneTensor) -> Iterator[Text]:
    """The owner of each cell, as one letter."""
    for owners in owners_of(tensor, rows=MAP_ROWS, columns=MAP_COLUMNS):
        line = Text("")
        for owner in owners:
            letter = _letter(tensor, owner)
            line.append(letter, style_of(owner) if letter.isalnum() else "")
        yield line


def _letter(tensor: SceneTensor, owner: int | None) -> str:
    if tensor.placement == "Partial":
        return SUMMAND_LETTER
    if tensor.is_alike:
        return EVERY_LETTER
    return UNKNOWN_LETTER if owner is None or tensor.dim is None else letter_of(owner)


def _scene(scene: Scene, view: StepView, values: bool, width: int) -> Iterator[Text]:
    head = Text(scene.title, "bold" if scene.is_collective else "")
    if scene.formula:
        head.append(f", {scene.formula}", "not bold")
    yield from _hung(f"{scene.number:>3}. ", head, width, INDENT)
    if scene.arrows:
        is_brief = view.degree > MOST_ARROWS
        for arrow, text in arrow_sentences(scene.arrows, is_brief=is_brief, has_numbers=values):
            line = Text.assemble((f"rank {arrow.sender}", style_of(arrow.sender)), f" ==> {text}")
            yield from _hung(_MARGIN, line, width, INDENT + 4)
        results = [f"{tensor.name} {tensor.shape}" for tensor in scene.tensors if tensor.is_result]
        text = f"{placement_change(scene.tensors)}: {', '.join(results)}"
        yield from _hung(_MARGIN, Text(text), width, INDENT + 4)
    else:
        yield from _hung(_MARGIN, Text(_flow(scene)), width, INDENT + 4)
    for tensor in scene.tensors:
        if tensor.is_broken:
            yield Text(f"{_MARGIN}{tensor.name} is NOT the same on every rank", "bold red")
    if values and view.has_values:
        for tensor in scene.tensors:
            yield from _numbers(tensor, width)


def _flow(scene: Scene) -> str:
    operands = [_named(tensor) for tensor in scene.tensors if not tensor.is_result]
    results = [_named(tensor) for tensor in scene.tensors if tensor.is_result]
    return " -> ".join(filter(None, (", ".join(operands), ", ".join(results))))


def _named(tensor: SceneTensor) -> str:
    return f"{tensor.name} {_shape(tensor)}"


def _shape(tensor: SceneTensor) -> str:
    return f"{tensor.shape} {tensor.placement or ('same' if tensor.is_alike else '?')}"


def _numbers(tensor: SceneTensor, width: int) -> Iterator[Text]:
    """The numbers of a tensor, with the rank and the index of each line."""
    room = max(2, (width - INDENT - 8) // _CELL)
    for grid in grids_of(tensor, most_rows=VALUE_ROWS, most_columns=min(VALUE_COLUMNS, room)):
        if not any(any(row) for row in grid.cells):
            return  # numbers were not kept
        part = " in part" * grid.is_part
        label = f", {grid.label}" if grid.label else ""
        yield Text(f"{_MARGIN}{tensor.name} {tensor.shape}{label}{part}", "italic")
        yield from _grid(grid, room)


def _grid(grid: Grid, room: int) -> Iterator[Text]:
    """The cells of a grid; columns that do not fit come below the others."""
    by_columns, by_rows = grid.cut == "columns", grid.cut == "rows"
    places = range(len(grid.columns))
    for start in range(0, len(grid.columns), room):
        chosen = places[start : start + room]
        if len(grid.columns) > 1 or by_columns:
            heads = (grid.columns[place] for place in chosen)
            head_cells = [_head(column.head, column.owner, by_columns) for column in heads]
            yield Text(_MARGIN + " " * 8 + "".join(head.rjust(_CELL) for head in head_cells))
        for row, cells in enumerate(grid.cells):
            line = grid.rows[row]
            text = Text(_MARGIN)
            text.append(_head(line.head, line.owner, by_rows).rjust(7) + " ", "dim")
            for place in chosen:
                text.append(_short(cells[place]).rjust(_CELL), style_of(grid.owner_of(row, place)))
            yield text


def _short(cell: str) -> str:
    """A number with fewer digits if it is as wide as its column."""
    try:
        return cell if len(cell) < _CELL else f"{float(cell):.1e}"
    except ValueError:  # a complex one
        return f"{cell[: _CELL - 4]}..."


def _head(index: str, owner: int | None, is_owned: bool) -> str:
    return f"{letter_of(owner)}:{index}" if is_owned and owner is not EVERY_RANK else index


def _memory(view: StepView) -> str:
    """The most that each rank holds."""
    peaks = ", ".join(f"rank {rank} {peak:,}" for rank, peak in enumerate(view.peaks))
    return f"Most bytes held after a step: {peaks}."


def _wrapped(text: str, width: int) -> list[Text]:
    return [Text(line) for line in textwrap.wrap(text, width)]


def _hung(start: str, line: Text, width: int, indent: int) -> Iterator[Text]:
    """A line that begins with `start`; where it is too long it is broken, the rest indented."""
    console = Console(width=width)
    first, *others = line.wrap(console, width - max(len(start), indent))
    yield Text(start) + first
    for other in others:
        yield Text(" " * indent) + other
