"""Pictures of the lessons: matrices as grids of their own numbers, coloured by the rank that owns.

    x_cut, w_cut = grid(x, "x (2, 4)", columns=owners), grid(w, "w (4, 8)", rows=owners)
    picture([[x_cut, "@", w_cut]], "y = x w, with w cut by rows")

A picture shows itself in a notebook. `docs/make_lessons.py` writes it into a file for the page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

# Blue, red, green, ...: told apart also by people who see few colours (Paul Tol's "bright").
COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#dd8833",
)  # fmt: skip
EVERY = -1  # as an owner: every rank has the same
FONT = "Helvetica,Arial,sans-serif"
CELL_HEIGHT, DIGIT, GAP, TITLE, NOTE, MARGIN = 20, 6.4, 14, 22, 18, 10
MOST_COLUMNS, MOST_ROWS = 12, 16  # of a matrix that still has its numbers written

Owner = Callable[[int, int], int]


@dataclass(frozen=True)
class Picture:
    """An SVG, and what it shows in words."""

    svg: str
    words: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"Picture: {self.words}"


@dataclass(frozen=True)
class Grid:
    """One matrix: its numbers, who owns each, a title above and a note below."""

    values: Tensor
    title: str
    owner: Owner
    note: str
    digits: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.values.shape
        return rows, columns

    @property
    def has_numbers(self) -> bool:
        """True if the matrix is small enough for them."""
        return self.shape[0] <= MOST_ROWS and self.shape[1] <= MOST_COLUMNS

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of one number."""
        if not self.has_numbers:
            return (6.0, 6.0) if max(self.shape) > 16 else (9.0, 9.0)
        longest = max((len(self.text(v)) for v in self.values.flatten().tolist()), default=1)
        return max(22.0, longest * DIGIT + 8), CELL_HEIGHT

    @property
    def size(self) -> tuple[float, float]:
        """Width and height with title and note."""
        (rows, columns), (width, height) = self.shape, self.cell
        words = max(len(self.title) * 6.6, len(self.note) * 5.7)
        return max(columns * width, words), TITLE + rows * height + (NOTE if self.note else 0)

    def text(self, value: float) -> str:
        """A number as it is written in a cell."""
        return f"{value:.{self.digits}f}"


def grid(
    values: Tensor,
    title: str,
    *,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    everybody: int = EVERY,
    note: str = "",
    digits: int | None = None,
) -> Grid:
    """A matrix to draw.

    Args:
        values: (rows, columns); a vector is drawn as one row.
        title: above it.
        rows: owner of each row, if it is cut by rows.
        columns: owner of each column, if it is cut by columns.
        everybody: owner of all of it, if it is not cut.
        note: below it.
        digits: after the point; by default 0 for whole numbers and 2 for others.
    """
    table = values.detach().reshape(-1, values.shape[-1])
    if digits is None:
        digits = 0 if bool((table == table.round()).all()) else 2

    def owner(i: int, j: int) -> int:
        if rows is not None:
            return rows[i]
        return columns[j] if columns is not None else everybody

    return Grid(table, title, owner, note, digits)


def picture(lines: Sequence[Sequence[Grid | str]], words: str) -> Picture:
    """Draw lines of grids with signs between them ("@", "=", "+", "all-reduce").

    Args:
        lines: each from left to right.
        words: what the picture shows, for those who cannot see it.
    """
    drawn: list[str] = []
    top, widest = float(MARGIN), 0.0
    for line in lines:
        height = max(item.size[1] for item in line if isinstance(item, Grid))
        left = float(MARGIN)
        for item in line:
            if isinstance(item, str):
                width = len(item) * 6.6 + 6
                drawn.append(_text(left + width / 2, top + TITLE + (height - TITLE) / 2, item, 12))
            else:
                width = item.size[0]
                drawn += _grid(item, left, top)
            left += width + GAP
        widest, top = max(widest, left), top + height + GAP
    ranks = sorted({_owner for line in lines for item in line for _owner in _owners(item)})
    drawn += _legend(ranks, top)
    width, height = max(widest, 90 + 74 * len(ranks)) + MARGIN, top + 30
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" role="img" aria-label="{words}" font-family="{FONT}">'
    )
    ground = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    return Picture("\n".join([head, ground, *drawn, "</svg>"]) + "\n", words)


def _owners(item: Grid | str) -> set[int]:
    if isinstance(item, str):
        return set()
    rows, columns = item.shape
    return {item.owner(i, j) for i in range(rows) for j in range(columns)}


def _grid(item: Grid, left: float, top: float) -> list[str]:
    (rows, columns), (width, height) = item.shape, item.cell
    lines = [_text(left, top + 14, item.title, 12, anchor="start", weight="bold")]
    strongest = item.values.abs().max().item() or 1.0
    for i in range(rows):
        for j in range(columns):
            x, y = left + j * width, top + TITLE + i * height
            value, owner = item.values[i, j].item(), item.owner(i, j)
            strength = 0.35 if item.has_numbers else 0.12 + 0.88 * abs(value) / strongest
            edge = ' stroke="#555555" stroke-width="0.6"' if item.has_numbers else ""
            lines.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{_colour(owner)}" fill-opacity="{strength:.2f}"{edge}/>'
            )
            if item.has_numbers:
                lines.append(_text(x + width / 2, y + height / 2 + 4, item.text(value), 11))
    if item.note:
        below = top + TITLE + rows * height + 13
        lines.append(_text(left, below, item.note, 10.5, anchor="start", fill="#444444"))
    return lines


def _legend(ranks: Sequence[int], top: float) -> list[str]:
    lines, left = [], float(MARGIN)
    for rank in ranks:
        name = "every rank" if rank == EVERY else f"rank {rank}"
        lines.append(
            f'<rect x="{left:.0f}" y="{top:.0f}" width="14" height="14" fill="{_colour(rank)}" '
            'fill-opacity="0.50" stroke="#555555" stroke-width="0.6"/>'
        )
        lines.append(_text(left + 19, top + 11, name, 11, anchor="start"))
        left += 34 + len(name) * 6.2
    return lines


def _colour(owner: int) -> str:
    return "#bbbbbb" if owner == EVERY else COLOURS[owner % len(COLOURS)]


def _text(
    x: float,
    y: float,
    text: str,
    size: float,
    *,
    anchor: str = "middle",
    weight: str = "normal",
    fill: str = "#111111",
) -> str:
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}" fill="{fill}">{safe}</text>'
    )
