"""Text, boxes and matrices as SVG: what the drawings of docs share. Plain Python, no package.

A picture has a background of its own, in light and in dark, so that it can be read on any page.
Widths of text are those of Helvetica, which Arial and Liberation Sans have too.
"""

from collections.abc import Iterable, Sequence
from html import escape

# Advance widths of Helvetica in thousandths of the font size, for the characters 32 to 126.
_WIDTHS = (
    278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278,
    556, 556, 556, 556, 556, 556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556,
    1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833, 722, 778,
    667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556,
    333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556,
    556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584,
)  # fmt: skip
_OTHER = 600  # of any other character
_MONO = 602  # of each character of DejaVu Sans Mono, the widest that is common

BOTH = "both"
RANKS = ("r0", "r1", "r2")

# Class -> (fill, stroke), in light and in dark.
LIGHT = {
    "r0": ("#cfe0f3", "#4477aa"),
    "r1": ("#fbd5d9", "#cc3f52"),
    "r2": ("#d3ecd6", "#228833"),
    "both": ("#ececec", "#777777"),
    "bar": ("#f6f8fa", "#b5bcc4"),
    "page": ("#ffffff", "none"),
}
DARK = {
    "r0": ("#1f4468", "#77aadd"),
    "r1": ("#6a2833", "#ee8896"),
    "r2": ("#1d5028", "#66bb77"),
    "both": ("#3a4048", "#9aa3ad"),
    "bar": ("#161b22", "#4a525c"),
    "page": ("#0d1117", "none"),
}
LIGHT_INK, DARK_INK = "#1f2328", "#e6edf3"
SANS = "Helvetica,Arial,'Liberation Sans',sans-serif"
MONO = "'DejaVu Sans Mono',Menlo,Consolas,monospace"


def style(sizes: dict[str, float], *, with_dark: bool = True) -> str:
    """The style sheet of a picture.

    Args:
        sizes: class of a text -> its font size.
        with_dark: whether the picture has colours of its own for dark pages.
    """
    rules = [f"text{{font-family:{SANS};fill:{LIGHT_INK}}}"]
    rules += [f".{name}{{font-size:{size:g}px}}" for name, size in sizes.items()]
    rules += [
        ".bold{font-weight:bold}",
        f".mono{{font-family:{MONO}}}",
        ".middle{text-anchor:middle}",
        f".line{{stroke:{LIGHT_INK};stroke-width:1.2;fill:none}}",
    ]
    rules += _fills(LIGHT)
    if with_dark:
        dark = [f"text{{fill:{DARK_INK}}}.line{{stroke:{DARK_INK}}}", *_fills(DARK)]
        rules.append("@media(prefers-color-scheme:dark){" + "".join(dark) + "}")
    return "<style>" + "".join(rules) + "</style>"


def _fills(colours: dict[str, tuple[str, str]]) -> list[str]:
    return [f".{name}{{fill:{fill};stroke:{stroke}}}" for name, (fill, stroke) in colours.items()]


def page(
    width: int, height: int, title: str, description: str, parts: Iterable[str], size: str = ""
) -> str:
    """A whole picture.

    Args:
        width: of the drawing.
        height: of the drawing.
        title: its name, for whoever cannot see it.
        description: what it shows, likewise.
        parts: elements, the style sheet first.
        size: attributes of its size on the page; the drawing's own in pixels, if not given.
    """
    size = size or f'width="{width}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size} '
        'role="img" aria-labelledby="title description">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(description)}</desc>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, content: str, classes: str) -> str:
    """One line of text; `y` is its baseline."""
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{escape(content, quote=False)}</text>'


def box(x: float, y: float, width: float, height: float, classes: str, *, radius: int = 0) -> str:
    """A rectangle."""
    corner = f' rx="{radius}"' if radius else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{corner} '
        f'class="{classes}"/>'
    )


def matrix(
    name: str,
    values: Sequence[Sequence[int]],
    owners: Sequence[Sequence[str]],
    *,
    x: float,
    y: float,
    cell: float,
) -> str:
    """A matrix with its numbers, each cell in the colour of its owner.

    Args:
        name: id of the group, by which a test finds it.
        values: row by row.
        owners: the class of each cell, likewise.
        x: of the upper left corner.
        y: of the upper left corner.
        cell: side of a cell.
    """
    lines = [f'<g id="{name}">']
    for i, (row, classes) in enumerate(zip(values, owners, strict=True)):
        for j, (value, owner) in enumerate(zip(row, classes, strict=True)):
            left, top = x + j * cell, y + i * cell
            lines.append(box(left, top, cell, cell, owner))
            label = str(value).replace("-", "\N{MINUS SIGN}")
            lines.append(text(left + cell / 2, top + cell * 0.7, label, "cell middle"))
    return "\n".join([*lines, "</g>"])


def width_of(content: str, size: float, *, is_mono: bool = False) -> float:
    """How wide a text is, in units of its font size."""
    if is_mono:
        return len(content) * _MONO * size / 1000
    return sum(_width(character) for character in content) * size / 1000


def _width(character: str) -> int:
    code = ord(character) - 32
    return _WIDTHS[code] if 0 <= code < len(_WIDTHS) else _OTHER


def wrapped(content: str, size: float, room: float, *, first: float = 0.0) -> list[str]:
    """The text in lines of at most `room`; `first` is what the first line has less.

    Raises:
        ValueError: one word is wider than that.
    """
    lines, line, left = [], "", room - first
    for word in content.split():
        longer = f"{line} {word}" if line else word
        if width_of(longer, size) <= left:
            line = longer
            continue
        if not line or width_of(word, size) > room:
            raise ValueError(f"{word!r} is wider than the {left:g} units that there are.")
        lines.append(line)
        line, left = word, room
    return [*lines, line] if line else lines
