"""Draws the losses of every training of a report, at every degree, with matplotlib (an extra).

The curves of all degrees have the same bits and coincide. They are drawn from wide to narrow, so
all of them can be seen.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Data = Mapping[str, Any]

COLUMNS = 3
WIDTH, HEIGHT, TITLE = 4.6, 3.2, 0.7  # inches of a panel, and of what stands above all
WIDEST, NARROWEST, SINGLE = 7.0, 1.2, 1.6  # points
COLOURS = (
    "#b9d6ea", "#6fa8d0", "#58a55c", "#d08a3e", "#7d4a9e", "#222222", "#c94f4f", "#eeee55",
)  # fmt: skip


def is_installed() -> bool:
    """True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Data, path: Path) -> None:
    """Write the picture.

    Args:
        report: as `Report.as_dict` has it, with a curve at least.
        path: its suffix gives the format.
    """
    draw_panels(list(_panels(report)), caption(report), path)


def draw_panels(
    panels: Sequence[tuple[str, Mapping[str, Sequence[float | None]]]],
    title: str,
    path: Path,
    *,
    coincide: bool = True,
) -> None:
    """Write a picture of some panels.

    Args:
        panels: the title of each, and degree -> losses; None is a gap.
        title: of the picture.
        path: its suffix gives the format.
        coincide: whether the curves lie on each other, and so need different widths.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (WIDTH * max(columns, 2), HEIGHT * rows + TITLE)
    figure = Figure(figsize=size, layout="constrained")
    for place, (name, curves) in enumerate(panels):
        widths = _widths(len(curves)) if coincide else [SINGLE] * len(curves)
        _fill(figure.add_subplot(rows, columns, place + 1), name, curves, widths)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def caption(report: Data) -> str:
    """What the picture shows, and what it cannot show."""
    differing = [title for title, curves in _panels(report) if len(set(curves.values())) > 1]
    if differing:
        return f"the degrees have different losses in {', '.join(differing)}"
    many = any(len(curves) > 1 for _, curves in _panels(report))
    what = "the curves of all degrees have the same bits and coincide" if many else "one degree"
    return f"{what} ({report['numerics']}, {report['engine']}, seed {report['seed']})"


def _panels(report: Data) -> Iterator[tuple[str, dict[str, tuple[float | None, ...]]]]:
    """For every training its name, and degree -> losses."""
    for case in report["cases"]:
        for run, by_degree in case["curves"].items():
            title = f"{case['name']}, {run}" if run else case["name"]
            yield title, {degree: tuple(losses) for degree, losses in by_degree.items()}


def _fill(
    axes: Any, title: str, curves: Mapping[str, Sequence[float | None]], widths: Sequence[float]
) -> None:
    """Fill one panel; NaN and Inf are gaps."""
    for place, (degree, losses) in enumerate(curves.items()):
        axes.plot(
            range(1, len(losses) + 1),
            [math.nan if loss is None else loss for loss in losses],
            linewidth=widths[place],
            color=COLOURS[(place + (widths[0] == SINGLE)) % len(COLOURS)],
            label=f"degree {degree}",
            solid_capstyle="butt",
        )
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7)
    axes.set_title(title, fontsize=9)


def _widths(count: int) -> list[float]:
    step = (WIDEST - NARROWEST) / max(1, count - 1)
    return [WIDEST - place * step for place in range(count)]
