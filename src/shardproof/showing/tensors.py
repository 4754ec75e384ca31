"""A tensor of a scene as it lies on all ranks, and the grids of cells in which it is drawn.

Only the last two dims are drawn, and of larger tensors a part of them. A cut dim that is drawn is
drawn once, with the ranks' parts side by side. Anything else is a grid for each rank, or one grid
if all ranks have the same. The terminal and the page draw the same grids.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardproof.showing.actions import base_name
from shardproof.trace.step import CORNER, Part
from shardproof.tree import node_name

SUMMANDS = "summands"


@dataclass(frozen=True)
class RankPart:
    """What one rank has of a tensor.

    Attributes:
        rank: whose.
        part: as its trace has it.
    """

    rank: int
    part: Part


@dataclass(frozen=True)
class SceneTensor:
    """A tensor as it lies on all ranks.

    Attributes:
        name: as the ranks call it.
        placement: "Replicate", "Shard(d)" or "Partial"; "" if it is not known, or not alike.
        shape: of the whole tensor; of one rank's part if the placement is not known.
        dtype: as torch writes it, without the prefix.
        pieces: in rank order; a rank may have several summands.
        is_result: the step made it; else the step read it.
    """

    name: str
    placement: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[RankPart, ...]
    is_result: bool

    @property
    def is_alike(self) -> bool:
        """Whether every rank has the same numbers, as far as they are known.

        Where the placement is not known, the numbers must be, and be the same bit by bit.
        """
        parts = [piece.part for piece in self.pieces]
        if len({piece.rank for piece in self.pieces}) < len(parts):
            return False
        different_parts = {repr((part.shape, part.values, part.corner)) for part in parts}
        if self.placement == "Replicate":
            return len(different_parts) == 1
        are_whole = all(part.values is not None for part in parts)
        return not self.placement and len(different_parts) == 1 and are_whole

    @property
    def is_broken(self) -> bool:
        """Whether a Replicate tensor has different numbers on different ranks."""
        return self.placement == "Replicate" and not self.is_alike

    @property
    def dim(self) -> int | None:
        """The dim that is cut."""
        if not self.placement.startswith("Shard"):
            return None
        return self.pieces[0].part.dim


def tensor_of(pieces: Sequence[RankPart], *, is_result: bool, name: str = "") -> SceneTensor:
    """The tensor of which these are the pieces.

    Args:
        pieces: in rank order.
        is_result: the step made it.
        name: what the tensor is called, if its pieces do not say it.
    """
    parts = [piece.part for piece in pieces]
    placements = {part.placement for part in parts}
    placement = placements.pop() if len(placements) == 1 else ""
    shape, first = parts[0].shape, parts[0]
    if placement.startswith("Shard") and first.dim is not None:
        # Without a size, the parts are known to lie one after the other.
        size = sum(part.shape[first.dim] for part in parts) if first.size is None else first.size
        shape = (*shape[: first.dim], size, *shape[first.dim + 1 :])
    return SceneTensor(
        name or _name(parts),
        placement,
        shape=shape,
        dtype=first.dtype,
        pieces=tuple(pieces),
        is_result=is_result,
    )


def _name(parts: Sequence[Part]) -> str:
    """What all call it; of nodes of a sum ("y, leaves 0-3") the sum."""
    names = {base_name(part) for part in parts}
    return names.pop() if len(names) == 1 else SUMMANDS


EVERY_RANK = None  # the owner of what is the same on every rank
GAP = "..."
_DIGITS = 3  # of a number that are shown, at least
_MOST_DECIMALS = 5


@dataclass(frozen=True)
class GridLine:
    """A row or a column of a grid.

    Attributes:
        head: its index in the whole tensor; `GAP` where some are left out.
        owner: the rank that holds it, or `EVERY_RANK`.
    """

    head: str
    owner: int | None


@dataclass(frozen=True)
class Grid:
    """Cells of a matrix.

    Attributes:
        label: whose it is, or "".
        owner: of all cells; `EVERY_RANK` also if they have owners of their own.
        cut: "rows" or "columns" if each of these has an owner of its own; else "".
        rows, columns: with their heads.
        cells: row by row; "" where numbers are not known.
        is_part: some rows, columns or leading indices are left out.
    """

    label: str
    owner: int | None
    cut: str
    rows: tuple[GridLine, ...]
    columns: tuple[GridLine, ...]
    cells: tuple[tuple[str, ...], ...]
    is_part: bool

    def owner_of(self, row: int, column: int) -> int | None:
        """The rank that holds a cell."""
        if self.cut == "rows":
            return self.rows[row].owner
        return self.columns[column].owner if self.cut == "columns" else self.owner


def owners_of(tensor: SceneTensor, *, rows: int, columns: int) -> list[list[int | None]]:
    """The owner of each cell of the first grid; large matrices are scaled down.

    Args:
        tensor: what is drawn.
        rows: at most.
        columns: at most.
    """
    cut = _drawn_dim(tensor)
    piece = tensor.pieces[0]
    height, width = matrix_shape(piece.part.shape if cut is None else tensor.shape)
    owner = EVERY_RANK if cut is not None or tensor.is_alike else piece.rank
    # A rank that has nothing to do in a step is not among the pieces: nobody is known there.
    lines: list[int | None] = [None] * (width if cut == "columns" else height)
    end = 0
    for each in tensor.pieces:
        length = matrix_shape(each.part.shape)[1 if cut == "columns" else 0]
        start = end if each.part.held is None else each.part.held[0]
        end = start + length
        lines[start:end] = [each.rank] * len(lines[start:end])
    num_rows, num_columns = min(height, rows), min(width, columns)
    down = [row * height // num_rows for row in range(num_rows)]
    across = [column * width // num_columns for column in range(num_columns)]
    if cut is None:
        return [[owner for _ in across] for _ in down]
    return [[lines[y if cut == "rows" else x] for x in across] for y in down]


def grids_of(tensor: SceneTensor, *, most_rows: int, most_columns: int) -> tuple[Grid, ...]:
    """Draw a tensor.

    Args:
        tensor: what is drawn.
        most_rows: of a grid; where rows are cut, at least two of every rank.
        most_columns: the same for columns.
    """
    parts = [piece.part for piece in tensor.pieces]
    write = writer_of(parts)
    most = most_rows, most_columns
    if any(part.values is None for part in parts):  # nothing is known beyond the corner
        most = min(most_rows, CORNER), min(most_columns, CORNER)
    cut = _drawn_dim(tensor)
    if cut is not None:
        return (_side_by_side(tensor, cut, write=write, most=most),)
    if tensor.is_alike:
        first = tensor.pieces[0]
        return (_of_piece(first, label="every rank", owner=EVERY_RANK, write=write, most=most),)
    return tuple(
        _of_piece(piece, label=_label(piece, tensor), owner=piece.rank, write=write, most=most)
        for piece in tensor.pieces
    )


def _drawn_dim(tensor: SceneTensor) -> str | None:
    """Whether the cut dim is that of the drawn "rows" or "columns"; None for others."""
    if tensor.dim is None:
        return None
    from_last = len(tensor.shape) - tensor.dim
    return {1: "columns", 2: "rows"}.get(from_last)


def _label(piece: RankPart, tensor: SceneTensor) -> str:
    """The rank, and the leaves that the part sums or the index of the matrix that is drawn."""
    part, dim = piece.part, tensor.dim
    if part.node is not None:
        return f"rank {piece.rank}: {node_name(part.node)}"
    if dim is not None and part.held is not None and part.held[0] < part.held[1]:
        first, last = part.held[0], part.held[1] - 1
        which = f"{first}" if first == last else f"{first} of {first}-{last}"
        return f"rank {piece.rank}: index {which} of dim {dim}"
    return f"rank {piece.rank}" if part.name == tensor.name else f"rank {piece.rank}: {part.name}"


def _of_piece(
    piece: RankPart,
    *,
    label: str,
    owner: int | None,
    write: "Writer",
    most: tuple[int, int],
) -> Grid:
    height, width = matrix_shape(piece.part.shape)
    rows, columns = chosen(height, most[0]), chosen(width, most[1])
    cells = tuple(tuple(write(piece.part, row, column) for column in columns) for row in rows)
    heads = [tuple(GridLine(_head(index), owner) for index in each) for each in (rows, columns)]
    is_part = None in rows or None in columns or _num_matrices(piece.part.shape) > 1
    return Grid(label, owner, cut="", rows=heads[0], columns=heads[1], cells=cells, is_part=is_part)


def _side_by_side(tensor: SceneTensor, cut: str, *, write: "Writer", most: tuple[int, int]) -> Grid:
    """The parts of all ranks in one grid."""
    pieces = tensor.pieces
    share = max(2, most[0 if cut == "rows" else 1] // len(pieces))
    height, width = matrix_shape(tensor.shape)
    across = chosen(width, most[1]) if cut == "rows" else chosen(height, most[0])
    along: list[tuple[RankPart, int | None]] = []
    lines = []
    end = 0
    for piece in pieces:
        rows, columns = matrix_shape(piece.part.shape)
        length = rows if cut == "rows" else columns
        start = end if piece.part.held is None else piece.part.held[0]
        end = start + length
        for index in chosen(length, share):
            along.append((piece, index))
            lines.append(GridLine(_head(index, start), piece.rank))
    others = tuple(GridLine(_head(index), EVERY_RANK) for index in across)
    is_part = None in across or any(index is None for _, index in along)
    is_part = is_part or _num_matrices(tensor.shape) > 1
    if cut == "rows":
        cells = tuple(tuple(write(p.part, row, column) for column in across) for p, row in along)
    else:
        cells = tuple(tuple(write(p.part, row, column) for p, column in along) for row in across)
    down, right = (tuple(lines), others) if cut == "rows" else (others, tuple(lines))
    return Grid("", EVERY_RANK, cut=cut, rows=down, columns=right, cells=cells, is_part=is_part)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of what is drawn of a tensor: its last two dims.

    >>> matrix_shape(()), matrix_shape((3,)), matrix_shape((2, 5, 4))
    ((1, 1), (1, 3), (5, 4))
    """
    if not shape:
        return 1, 1
    return (1 if len(shape) == 1 else shape[-2]), shape[-1]


def _num_matrices(shape: Sequence[int]) -> int:
    return math.prod(shape[:-2])


def chosen(length: int, most: int) -> list[int | None]:
    """The indices that are drawn; None stands for those that are left out.

    >>> chosen(5, 4), chosen(9, 4)
    ([0, 1, 2, 3, 4], [0, 1, 2, None])
    """
    if length <= most + 1:  # a gap of one would take as much room
        return list(range(length))
    return [*range(most - 1), None]


def _head(index: int | None, start: int = 0) -> str:
    return GAP if index is None else str(start + index)


class Writer:
    """Writes the numbers of one tensor, all with as many decimals.

    Args:
        decimals: after the point; None: with an exponent.
    """

    def __init__(self, decimals: int | None) -> None:
        self._decimals = decimals

    def __call__(self, part: Part, row: int | None, column: int | None) -> str:
        """One number of a part; "" if it is not known, `GAP` for those that are left out."""
        values = part.values if part.values is not None else part.corner
        if values is None:
            return ""
        if row is None or column is None:
            return GAP
        matrix = _last_two(values, len(part.shape))
        if row >= len(matrix) or column >= len(matrix[row]):
            return ""
        return self.number(matrix[row][column])

    def number(self, value: Any) -> str:
        """A number as text."""
        if isinstance(value, bool | int):
            return str(value)
        if isinstance(value, complex):
            return f"{value:.3g}"
        if not math.isfinite(value):
            return str(value)
        if value == 0:
            return "0"
        if self._decimals is None:
            return f"{value:.2e}"
        text = f"{value:.{self._decimals}f}"
        return text if float(text) else text.lstrip("-")  # what rounds to 0 has no sign


def writer_of(parts: Sequence[Part]) -> Writer:
    """A writer for which the largest of the numbers has enough digits.

    >>> part = Part("x", (2,), "float32", values=(0.25, -1.5))
    >>> writer_of([part]).number(-1.5), writer_of([]).number(2.0)
    ('-1.50', '2')
    """
    values_of_parts = [part.values if part.values is not None else part.corner for part in parts]
    sizes = [abs(x) for values in values_of_parts if values is not None for x in flat(values)]
    finite = [size for size in sizes if isinstance(size, float) and math.isfinite(size)]
    if all(size.is_integer() and size < 10**6 for size in finite):
        return Writer(0)
    decimals = _DIGITS - 1 - math.floor(math.log10(max(finite)))
    # Numbers of 1000 and more keep a digit after the point, which says that they are not whole.
    fits = -_DIGITS <= decimals <= _MOST_DECIMALS
    return Writer(max(decimals, 1) if fits else None)


def _last_two(values: Any, num_dims: int) -> Any:
    """The first matrix of nested tuples, as a tuple of rows."""
    if num_dims == 0:
        return ((values,),)
    if num_dims == 1:
        return (values,)
    for _ in range(num_dims - 2):
        values = values[0] if values else ((),)
    return values


def flat(values: Any) -> Iterator[Any]:
    """The numbers of nested tuples, one after another."""
    if isinstance(values, tuple):
        for each in values:
            yield from flat(each)
    else:
        yield values
