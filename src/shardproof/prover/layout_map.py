"""Draws a heat map of a proof over layouts: how many tensors differ in each, with matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CELL = 0.75  # inches
GOOD, BAD = "#58a55c", "#c94f4f"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture: a panel for each case, a row for tp and sequence, a column for the rest.

    Args:
        report: as `LayoutReport.as_dict` has it.
        path: its suffix gives the format.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    cases = report["cases"]
    layouts = cases[0]["layouts"]
    rows = sorted({(each["tp"], each["sequence"]) for each in layouts})
    columns = sorted({(each["dp"], each["accumulate"]) for each in layouts})
    size = (3 + CELL * len(columns), 1.2 + (1.3 + CELL * 0.6 * len(rows)) * len(cases))
    figure = Figure(figsize=size, layout="constrained")
    for place, case in enumerate(cases):
        axes = figure.add_subplot(len(cases), 1, place + 1)
        _fill(axes, case, rows, columns)
    figure.suptitle(
        f"number of tensors with other bits than on one rank ({report['engine']}, "
        f"seed {report['seed']})",
        fontsize=9,
    )
    figure.savefig(path, dpi=100)


def _fill(
    axes: Any, case: Mapping[str, Any], rows: list[tuple[int, bool]], columns: list[tuple[int, int]]
) -> None:
    """Fill one panel; layouts that were not run stay white."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415 - an optional extra

    for each in case["layouts"]:
        x = columns.index((each["dp"], each["accumulate"]))
        y = rows.index((each["tp"], each["sequence"]))
        count = len(each["differing"])
        color = BAD if count else GOOD
        axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=color))
        axes.text(x, y, str(count), ha="center", va="center", color="white", fontsize=8)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [f"{dp} | {each}" for dp, each in columns], fontsize=7)
    names = [f"{tp}, sequence" if is_cut else str(tp) for tp, is_cut in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xlabel("dp | accumulate", fontsize=8)
    axes.set_ylabel("tp", fontsize=8)
    axes.set_title(f"{case['name']}, {case['layouts'][0]['tensors']} tensors", fontsize=9)
    axes.spines[:].set_visible(False)
