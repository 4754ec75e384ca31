"""A report as one picture: the ratios of every work, and the all-reduce curves.

matplotlib is an optional extra.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import VARIANT_KEYS, message_size, rounds_text

Data = Mapping[str, Any]

EXTRA = "plot"  # of the package, that brings matplotlib
COLUMNS = 3
WIDTH, HEIGHT, BAR, TITLE = 5.2, 3.2, 0.15, 0.4  # inches of a panel, and of a bar in it
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
NARROW = (0.8, 1.25, 1.5, 3)  # and these, where the ratios lie together
SHARES = {
    "flops_per_rank": "products",
    "parameter_bytes_per_rank": "weights",
    "peak_bytes_per_rank": "memory at its peak",
}
Fill = Callable[[Any], None]

# By family: invariant, native, plain torch, everybody else.
COLOURS = {"invariant": "#1b6ca8", "native": "#58a55c", "torch": "#888888", "": "#d08a3e"}
LINES = {"shm": "-", "threads": "--", "gloo": ":"}


def is_installed() -> bool:
    """True if matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Data, path: Path) -> None:
    """Write the picture; the suffix of `path` says in which format."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    panels = list(_panels(report))
    lines = [panels[at : at + COLUMNS] for at in range(0, len(panels), COLUMNS)]
    heights = [max(HEIGHT, max(size for size, _ in line)) for line in lines]
    size = (WIDTH * COLUMNS, sum(heights) + TITLE)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(max(1, len(lines)), COLUMNS, height_ratios=heights or [1])
    for row, line in enumerate(lines):
        for column, (_, fill) in enumerate(line):
            fill(figure.add_subplot(grid[row, column]))
    environment = report["environment"]
    figure.suptitle(
        f"{environment['cpu']}, {environment['cores']} cores, torch {environment['torch']}, "
        f"shardproof {environment['shardproof']}, {rounds_text(report)}",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)


def _panels(report: Data) -> Iterator[tuple[float, Fill]]:
    """Wanted height and drawing function of each panel."""
    panels: dict[str, list[Data]] = {}
    for row in report["results"]:
        variant = " ".join(str(row[key]) for key in VARIANT_KEYS if key in row)
        panels.setdefault(f"{row['work']} {variant}".strip(), []).append(row)
    for title, rows in panels.items():
        if "flops_per_rank" in rows[0]:
            yield HEIGHT, functools.partial(_shares, title=title, rows=rows)
        else:
            yield BAR * len(rows) + 1, functools.partial(_bars, title=title, rows=rows)
    for ranks in sorted({row["ranks"] for row in report["all_reduce"]}):
        rows = [row for row in report["all_reduce"] if row["ranks"] == ranks]
        yield HEIGHT, functools.partial(_curves, ranks=ranks, rows=rows)


def _bars(axes: Any, *, title: str, rows: Sequence[Data]) -> None:
    """Ratios on a log scale, from 1 to the left (faster) or to the right (slower)."""
    several = len({row["ranks"] for row in rows if row["transport"] is not None}) > 1
    names = [f"{row['system']} x{row['ranks']}" if several else row["system"] for row in rows]
    ratios = [row["ratio"] for row in rows]
    places = range(len(rows))
    lengths = [ratio - 1 for ratio in ratios]
    axes.barh(places, lengths, left=1, color=[_colour(row["system"]) for row in rows])
    axes.set_xscale("log")
    least, most = min([*ratios, 0.9]), max([*ratios, 1.1])
    room = (most / least) ** 0.12  # for the figures beside the bars
    axes.set_xlim(least / room, most * room)
    wanted = TICKS + NARROW if most / least < 6 else TICKS
    ticks = [tick for tick in sorted(wanted) if least / room < tick < most * room]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for place, ratio in zip(places, ratios, strict=True):
        side, gap = ("left", room**0.1) if ratio >= 1 else ("right", room**-0.1)
        axes.text(ratio * gap, place, f"{ratio:.2f}", va="center", ha=side, fontsize=6)
    axes.set_title(f"{title}: time, ratio to torch-2t", fontsize=9)


def _shares(axes: Any, *, title: str, rows: Sequence[Data]) -> None:
    """What the busiest rank computes and holds, as a share of what one rank alone does."""
    first = next(row for row in rows if row["system"] != "torch-2t")
    mine = {row["ranks"]: row for row in rows if row["system"] == first["system"]}
    degrees = sorted(mine)
    for key, label in SHARES.items():
        values = [mine[degree][key] / mine[degrees[0]][key] for degree in degrees]
        axes.plot(degrees, values, marker=".", label=label)
    ideal = [degrees[0] / degree for degree in degrees]
    axes.plot(degrees, ideal, "--", color="black", linewidth=0.8, label="1 / degree")
    axes.set_ylim(0, 1.05)
    axes.set_xticks(degrees)
    axes.set_xlabel("degree", fontsize=8)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=6)
    axes.set_title(f"{title}: share of one rank's ({first['system']})", fontsize=9)


def _curves(axes: Any, *, ranks: int, rows: Sequence[Data]) -> None:
    """Median time over the size of the message, both on log scales."""
    sizes = sorted({row["bytes"] for row in rows})
    for name in dict.fromkeys(row["system"] for row in rows):
        mine = sorted((row["bytes"], row["median_us"]) for row in rows if row["system"] == name)
        line = "-." if name == "memcpy" else LINES.get(name.rpartition("-")[2], "-")
        colour = "black" if name == "memcpy" else _colour(name)
        axes.plot(
            [size for size, _ in mine],
            [time for _, time in mine],
            line,
            marker=".",
            color=colour,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [message_size(size) for size in sizes], rotation=45, fontsize=7)
    axes.set_ylabel("median us", fontsize=8)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=6)
    axes.set_title(f"all-reduce, {ranks} ranks", fontsize=9)


def _colour(system: str) -> str:
    family = system.partition("-")[0]
    return COLOURS.get(family, COLOURS[""])
