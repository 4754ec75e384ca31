"""A report of the bench as one picture: the ratios of every work, and the all-reduce curves.

matplotlib is an optional extra.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardproof.bench.tables import VARIANT_KEYS, message_size

Data = Mapping[str, Any]

EXTRA = "plot"
SUFFIXES = (".png", ".svg", ".pdf")
COLUMNS = 3
WIDTH, HEIGHT = 5.2, 3.3  # inches of one panel

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
    ranks = sorted({row["ranks"] for row in report["all_reduce"]})
    count = len(panels) + len(ranks)
    rows = max(1, math.ceil(count / COLUMNS))
    figure = Figure(figsize=(WIDTH * COLUMNS, HEIGHT * rows), layout="constrained")
    for place, (title, shown) in enumerate(panels, start=1):
        _bars(figure.add_subplot(rows, COLUMNS, place), title, shown)
    for place, number in enumerate(ranks, start=len(panels) + 1):
        shown = [row for row in report["all_reduce"] if row["ranks"] == number]
        _curves(figure.add_subplot(rows, COLUMNS, place), number, shown)
    environment = report["environment"]
    figure.suptitle(
        f"{environment['cpu']}, {environment['cores']} cores, torch {environment['torch']}, "
        f"shardproof {environment['shardproof']}, {report['rounds']} rounds",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def _panels(report: Data) -> Iterator[tuple[str, list[Data]]]:
    """Title and rows of each panel of bars: one for each work, or each of its variants."""
    found: dict[str, list[Data]] = {}
    for row in report["results"]:
        variant = " ".join(str(row[key]) for key in VARIANT_KEYS if key in row)
        found.setdefault(f"{row['work']} {variant}".strip(), []).append(row)
    yield from found.items()


def _bars(axes: Any, title: str, rows: Sequence[Data]) -> None:
    """Ratios on a log scale, from 1 to the left (faster) or to the right (slower)."""
    several = len({row["ranks"] for row in rows if row["transport"] is not None}) > 1
    names = [f"{row['system']} x{row['ranks']}" if several else row["system"] for row in rows]
    ratios = [row["ratio"] for row in rows]
    places = range(len(rows))
    axes.barh(
        places,
        [ratio - 1 for ratio in ratios],
        left=1,
        color=[_colour(row["system"]) for row in rows],
    )
    axes.set_xscale("log")
    least, most = min([*ratios, 0.9]), max([*ratios, 1.1])
    axes.set_xlim(least / 1.25, most * 1.25)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if least / 1.25 < tick < most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, names, fontsize=7 if len(rows) < 16 else 5)
    axes.invert_yaxis()
    for place, ratio in zip(places, ratios, strict=True):
        side = "left" if ratio >= 1 else "right"
        gap = 1.02 if ratio >= 1 else 1 / 1.02
        axes.text(ratio * gap, place, f"{ratio:.2f}", va="center", ha=side, fontsize=6)
    axes.set_title(f"{title}: time, ratio to torch-2t", fontsize=9)


def _curves(axes: Any, ranks: int, rows: Sequence[Data]) -> None:
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
