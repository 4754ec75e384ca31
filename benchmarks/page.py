"""Writes the figures of docs/performance.md from a report, and draws its picture.

    python -m benchmarks --json docs/performance.json
    python -m benchmarks.page

It writes only what stands between the two marks. The picture needs the extra `plot`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.report import markdown, rounds_text, tables
from benchmarks.systems import find_system
from benchmarks.works import WORKS

DOCS = Path(__file__).parents[1] / "docs"
REPORT, PAGE, PICTURE = (DOCS / f"performance.{suffix}" for suffix in ("json", "md", "png"))
BEGIN, END = "<!-- written by python -m benchmarks.page -->\n", "<!-- until here -->\n"


def written(report: dict[str, Any]) -> str:
    """What stands between the marks."""
    return "\n".join(_blocks(report)) + "\n"


def _blocks(report: dict[str, Any]) -> Iterator[str]:
    environment = report["environment"]
    descriptions = {work.name: work.description for work in WORKS}
    peers = [f"{name} {version}" for name, version in environment["peers"].items()]
    yield f"    {report['command']}\n"
    yield (
        f"{environment['cpu']} ({environment['cpu_capability']}), {environment['cores']} cores, "
        f"{environment['memory_gib']:.0f} GiB; {environment['system']}; "
        f"Python {environment['python']}, torch {environment['torch']}, "
        f"shardproof {environment['shardproof']}"
        + (f"; {', '.join(peers)}" if peers else "")
        + f". {rounds_text(report)}{', quick: a glance, and noisy' if report['quick'] else ''}."
        + "\n"
    )
    yield f"![Ratios of every work, and times of all-reduces]({PICTURE.name})\n"
    for table in tables(report):
        yield f"### {table.title}\n"
        if table.title in descriptions:
            yield f"{descriptions[table.title]}.\n"
        yield f"{markdown(table)}\n"
    yield "### Who is who\n"
    names = dict.fromkeys(row["system"] for row in report["results"] + report["all_reduce"])
    contracts = {row["system"]: row["contract"] for row in report["results"] if row.get("contract")}
    yield "| system | what it is | contract |\n|---|---|---|"
    for name in names:
        contract = f"`{contracts[name]}`" if name in contracts else "-"
        yield f"| {name} | {find_system(name).description} | {contract} |"
    for kind, word in (("skipped", "Left out"), ("failed", "Failed")):
        for each in report[kind]:
            where = f" at {each['work']}" if each["work"] and each["system"] else ""
            yield f"\n{word}{where}: {each['system'] or each['work']}: {each['reason']}."


def replaced(page: str, report: dict[str, Any]) -> str:
    """The page with the figures of another report."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{written(report)}\n{END}{tail}"


def main() -> None:
    """Write the page and draw the picture."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")
    plot.draw(report, PICTURE)


if __name__ == "__main__":
    main()
