"""A figure as grids of cells, each with its owner: what the terminal and the page both draw.

Only the last two dims are drawn, and of larger tensors a part of them. A cut dim that is drawn is
drawn once, with the ranks' parts side by side; anything else is a grid for each rank, or one if all
have the same.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardproof.showing.figure import Figure, Piece
from shardproof.trace.step import CORNER, Part
from shardproof.tree import node_name

EVERY = None  # the owner of what is the same on every rank
GAP = "..."
_DIGITS = 3  # of a number that are shown, at least
_MOST_DECIMALS = 5


@dataclass(frozen=True)
class Line:
    """A row or a column of a grid.

    Attributes:
        head: its index in the whole tensor; `GAP` where some are left out.
        owner: the rank that holds it, or `EVERY`.
    """

    head: str
    owner: int | None


@dataclass(frozen=True)
class Grid:
    """Cells of a matrix.

    Attributes:
        label: whose it is, or "".
        owner: of all cells; `EVERY` also if they have owners of their own.
        cut: "rows" or "columns" if each of these has an owner of its own; else "".
        rows, columns: with their heads.
        cells: row by row; "" where numbers are not known.
        is_part: some rows, columns or leading indices are left out.
    """

    label: str
    owner: int | None
    cut: str
    rows: tuple[Line, ...]
    columns: tuple[Line, ...]
    cells: tuple[tuple[str, ...], ...]
    is_part: bool

    def owner_of(self, row: int, column: int) -> int | None:
        """The rank that holds a cell."""
        if self.cut == "rows":
            return self.rows[row].owner
        return self.columns[column].owner if self.cut == "columns" else self.owner


def owners_of(figure: Figure, *, rows: int, columns: int) -> list[list[int | None]]:
    """Whose each part of the first grid is, drawn smaller where the matrix is large.

    Args:
        figure: what is drawn.
        rows: at most.
        columns: at most.
    """
    cut = _drawn_dim(figure)
    piece = figure.pieces[0]
    height, width = matrix_shape(piece.part.shape if cut is None else figure.shape)
    owner = EVERY if cut is not None or figure.is_alike else piece.rank
    # A rank that has nothing to do in a step is not among the pieces: nobody is known there.
    lines: list[int | None] = [None] * (width if cut == "columns" else height)
    end = 0
    for each in figure.pieces:
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


def grids_of(figure: Figure, *, most_rows: int, most_columns: int) -> tuple[Grid, ...]:
    """Draw a figure.

    Args:
        figure: what is drawn.
        most_rows: of a grid; where rows are cut, at least two of every rank.
        most_columns: the same for columns.
    """
    parts = [piece.part for piece in figure.pieces]
    write = writer_of(parts)
    most = most_rows, most_columns
    if any(part.values is None for part in parts):  # nothing is known beyond the corner
        most = min(most_rows, CORNER), min(most_columns, CORNER)
    cut = _drawn_dim(figure)
    if cut is not None:
        return (_side_by_side(figure, cut, write=write, most=most),)
    if figure.is_alike:
        first = figure.pieces[0]
        return (_of_piece(first, label="every rank", owner=EVERY, write=write, most=most),)
    return tuple(
        _of_piece(piece, label=_label(piece, figure), owner=piece.rank, write=write, most=most)
        for piece in figure.pieces
    )


def _drawn_dim(figure: Figure) -> str | None:
    """Whether the cut dim is that of the drawn rows or columns."""
    if figure.dim is None:
        return None
    from_last = len(figure.shape) - figure.dim
    return {1: "columns", 2: "rows"}.get(from_last)


def _label(piece: Piece, figure: Figure) -> str:
    """Whose it is; which leaves it sums, or which of the matrices that the rank holds it is."""
    part, dim = piece.part, figure.dim
    if part.node is not None:
        return f"rank {piece.rank}: {node_name(part.node)}"
    if dim is not None and part.held is not None and part.held[0] < part.held[1]:
        first, last = part.held[0], part.held[1] - 1
        which = f"{first}" if first == last else f"{first} of {first}-{last}"
        return f"rank {piece.rank}: index {which} of dim {dim}"
    return f"rank {piece.rank}" if part.name == figure.name else f"rank {piece.rank}: {part.name}"


def _of_piece(
    piece: Piece,
    *,
    label: str,
    owner: int | None,
    write: "Writer",
    most: tuple[int, int],
) -> Grid:
    height, width = matrix_shape(piece.part.shape)
    rows, columns = chosen(height, most[0]), chosen(width, most[1])
    cells = tuple(tuple(write(piece.part, row, column) for column in columns) for row in rows)
    heads = [tuple(Line(_head(index), owner) for index in each) for each in (rows, columns)]
    is_part = None in rows or None in columns or _num_matrices(piece.part.shape) > 1
    return Grid(label, owner, cut="", rows=heads[0], columns=heads[1], cells=cells, is_part=is_part)


def _side_by_side(figure: Figure, cut: str, *, write: "Writer", most: tuple[int, int]) -> Grid:
    """The parts of all ranks in one grid."""
    pieces = figure.pieces
    share = max(2, most[0 if cut == "rows" else 1] // len(pieces))
    height, width = matrix_shape(figure.shape)
    across = chosen(width, most[1]) if cut == "rows" else chosen(height, most[0])
    along: list[tuple[Piece, int | None]] = []
    lines = []
    end = 0
    for piece in pieces:
        rows, columns = matrix_shape(piece.part.shape)
        length = rows if cut == "rows" else columns
        start = end if piece.part.held is None else piece.part.held[0]
        end = start + length
        for index in chosen(length, share):
            along.append((piece, index))
            lines.append(Line(_head(index, start), piece.rank))
    others = tuple(Line(_head(index), EVERY) for index in across)
    is_part = None in across or any(index is None for _, index in along)
    is_part = is_part or _num_matrices(figure.shape) > 1
    if cut == "rows":
        cells = tuple(tuple(write(p.part, row, column) for column in across) for p, row in along)
    else:
        cells = tuple(tuple(write(p.part, row, column) for p, column in along) for row in across)
    down, right = (tuple(lines), others) if cut == "rows" else (others, tuple(lines))
    return Grid("", EVERY, cut=cut, rows=down, columns=right, cells=cells, is_part=is_part)


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
    """Writes the numbers of one figure, all with as many decimals.

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
    known = [part.values if part.values is not None else part.corner for part in parts]
    sizes = [abs(x) for values in known if values is not None for x in flat(values)]
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
