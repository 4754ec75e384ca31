"""What a report has: the environment of a run, and its figures as tables of text.

The terminal and docs/performance.md show the same tables.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import shardproof
from benchmarks.systems import SYSTEMS
from shardproof import c_modules

Data = Mapping[str, Any]

KIB = 1024
# What tells variants of one work apart; everything else of a row is measured or the system's.
VARIANT_KEYS = ("layer", "phase")
# What is installed under another name than it is imported.
DISTRIBUTIONS = {"megatron": "megatron-core"}


def environment() -> dict[str, Any]:
    """Machine, versions and what may slow a system down here."""
    return {
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "shardproof": shardproof.__version__,
        "core": c_modules.problem() or "built",
        "dtype": "float32",
        "peers": {
            system.name: importlib.metadata.version(DISTRIBUTIONS.get(package, package))
            for system in SYSTEMS
            if (package := system.package) is not None and system.problem() is None
        },
    }


def _cpu() -> str:
    """What Linux calls the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class TextTable:
    """Cells, all of one width; the first column is a name, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: Data) -> Iterator[TextTable]:
    """Every table of a report, in its order."""
    works = dict.fromkeys(row["work"] for row in report["results"])
    for work in works:
        rows = [row for row in report["results"] if row["work"] == work]
        if any(key in rows[0] for key in VARIANT_KEYS):
            yield variant_table(work, rows)
        elif "flops_per_rank" in rows[0]:
            yield scaling_table(work, rows)
        else:
            yield work_table(work, rows)
    for ranks in sorted({row["ranks"] for row in report["all_reduce"]}):
        rows = [row for row in report["all_reduce"] if row["ranks"] == ranks]
        for what, key in (("median", "median_us"), ("99th percentile", "p99_us")):
            yield all_reduce_table(f"all-reduce, {ranks} ranks: {what}, us", rows, key)


def work_table(work: str, rows: Sequence[Data]) -> TextTable:
    """One row per system."""
    lines = [
        (
            row["system"],
            str(row["ranks"]),
            row["transport"] or "-",
            figure(row["median_ms"]),
            figure(row["min_ms"]),
            figure(row["p90_ms"]),
            f"{row['ratio']:.2f}",
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
        )
        for row in rows
    ]
    columns = ("system", "ranks", "over", "median ms", "min", "p90", "ratio", "half of rounds")
    return TextTable(work, columns, tuple(lines))


def variant_table(work: str, rows: Sequence[Data]) -> TextTable:
    """One row per system and degree, one column per variant: microseconds and the ratio."""
    variants = list(dict.fromkeys(_variant(row) for row in rows))
    groups = list(dict.fromkeys((row["system"], row["ranks"]) for row in rows))
    cells = {(row["system"], row["ranks"], _variant(row)): _cell(row) for row in rows}
    lines = [
        (system, str(ranks), *(cells.get((system, ranks, variant), "-") for variant in variants))
        for system, ranks in groups
    ]
    return TextTable(f"{work}: median us (ratio)", ("system", "ranks", *variants), tuple(lines))


def _variant(row: Data) -> str:
    return "\n".join(str(row[key]) for key in VARIANT_KEYS if key in row)


def _cell(row: Data) -> str:
    return f"{figure(row['median_ms'] * 1e3)} ({row['ratio']:.2f})"


def scaling_table(work: str, rows: Sequence[Data]) -> TextTable:
    """One row per system and degree: time, and what the busiest rank computes, holds and sends."""
    lines = [
        (
            row["system"],
            str(row["ranks"]),
            figure(row["median_ms"]),
            f"{row['ratio']:.2f}",
            figure(row["flops_per_rank"] / 1e9),
            mebibytes(row["parameter_bytes_per_rank"]),
            mebibytes(row["peak_bytes_per_rank"]),
            mebibytes(row["sent_bytes_per_rank"]),
            mebibytes(row["formula_bytes_per_rank"]),
        )
        for row in rows
    ]
    columns = ("system", "ranks", "median\nms", "ratio", "GFLOP", "weights\nMiB", "peak\nMiB",
               "sent\nMiB", "formula\nMiB")  # fmt: skip
    return TextTable(f"{work}: per rank and step", columns, tuple(lines))


def all_reduce_table(title: str, rows: Sequence[Data], key: str) -> TextTable:
    """One row per system, one column per size."""
    sizes = sorted({row["bytes"] for row in rows})
    systems = list(dict.fromkeys(row["system"] for row in rows))
    cells = {(row["system"], row["bytes"]): figure(row[key]) for row in rows}
    lines = [(name, *(cells.get((name, size), "-") for size in sizes)) for name in systems]
    return TextTable(title, ("system", *map(message_size, sizes)), tuple(lines))


def figure(number: float) -> str:
    """A time with as many digits as a reader compares.

    >>> figure(1.834), figure(50.14), figure(978.3), figure(50812.0)
    ('1.83', '50.1', '978', '50,812')
    """
    if number < 10:
        return f"{number:.2f}"
    return f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def mebibytes(num_bytes: float) -> str:
    """Bytes in MiB.

    >>> mebibytes(3 * 1024**2 / 2), mebibytes(0)
    ('1.50', '0.00')
    """
    return figure(num_bytes / KIB**2)


def rounds_text(report: Data) -> str:
    """How often every system had its turn.

    >>> rounds_text({"rounds": 1}), rounds_text({"rounds": 10})
    ('1 round', '10 rounds')
    """
    return f"{report['rounds']} round{'s' if report['rounds'] > 1 else ''}"


def message_size(num_bytes: int) -> str:
    """A power of two bytes as short as it goes.

    >>> message_size(4096), message_size(1 << 26)
    ('4 KiB', '64 MiB')
    """
    return f"{num_bytes // KIB} KiB" if num_bytes < KIB**2 else f"{num_bytes // KIB**2} MiB"


def markdown(table: TextTable) -> str:
    """A table as pages have it."""
    rule = "|---|" + "---:|" * (len(table.columns) - 1)
    return "\n".join([_line(table.columns), rule, *map(_line, table.rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("\n", " ")
