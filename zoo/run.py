"""Go through the models of the zoo and do steps with each.

    python -m zoo.run --list causal --step plain --json found.jsonl
    python -m zoo.run --only LlamaForCausalLM --only nanoGPT

Every model runs in a process with a time limit, so a crash or a hang costs one model.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: nothing is looked up

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from zoo.children import Child, Row
from zoo.lists import LISTS, names
from zoo.page import page
from zoo.steps import STEPS
from zoo.unbuildable import UNBUILDABLE
from zoo.work import work


def go_through(chosen: list[str], steps: list[str], *, limit: float, workers: int) -> Iterator[Row]:
    """One row for each model and step, in the order in which they end."""
    waiting: SimpleQueue[str] = SimpleQueue()
    done: SimpleQueue[Row] = SimpleQueue()
    for name in chosen:
        waiting.put(name)
    threads = [
        threading.Thread(target=_take, args=(waiting, done, steps, limit), daemon=True)
        for _ in range(max(1, min(workers, len(chosen))))
    ]
    for thread in threads:
        thread.start()
    for _ in range(len(chosen) * len(steps)):
        yield done.get()
    for thread in threads:
        thread.join()


def _take(
    waiting: SimpleQueue[str], done: SimpleQueue[Row], steps: list[str], limit: float
) -> None:
    child = Child(work, limit)
    try:
        while True:
            name = waiting.get_nowait()
            for step in steps:
                done.put(child.ask(name, step))
    except Empty:
        return
    finally:
        child.end()


def summary(rows: list[Row], lists: list[str]) -> Table:
    """How many models of each list did each step."""
    table = Table("list", "step", "models", "done", "not done", "seconds", "slowest")
    for which in lists:
        members = set(names(which))
        for step in dict.fromkeys(row["step"] for row in rows):
            of_list = [row for row in rows if row["step"] == step and row["name"] in members]
            if not of_list:
                continue
            failed = sum("reason" in row for row in of_list)
            slowest = max(of_list, key=lambda row: row["seconds"])
            table.add_row(
                which,
                step,
                str(len(of_list)),
                str(len(of_list) - failed),
                str(failed),
                f"{sum(row['seconds'] for row in of_list):.1f}",
                f"{slowest['name']} {slowest['seconds']:.1f}",
            )
    return table


def failures(rows: list[Row]) -> Table:
    """Each model that did not do a step, and why."""
    table = Table("model", "step", "why not")
    for row in sorted(rows, key=lambda row: str(row["name"])):
        if "reason" in row:
            known = UNBUILDABLE.get(row["name"])
            why = f"{known} {row['reason']}" if known else row["reason"]
            table.add_row(row["name"], row["step"], why)
    return table


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zoo.run", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="append", choices=LISTS, help="default: all lists")
    parser.add_argument("--only", action="append", metavar="NAME", help="this model; repeatable")
    parser.add_argument("--step", action="append", choices=STEPS, help="default: plain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="one line for each row")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write docs/zoo.md of step prove")
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    found = parser.parse_args(given)
    known = {name for which in LISTS for name in names(which)}
    unknown = sorted(set(found.only or []) - known)
    if unknown:
        parser.error(f"no list has {', '.join(unknown)}")
    return found


def main(given: list[str] | None = None) -> int:
    """Go through what the arguments choose; the number of models with a reason not known before."""
    options = _arguments(given)
    lists = options.list or list(LISTS)
    chosen = options.only or sorted({name for which in lists for name in names(which)})
    steps = options.step or ["plain"]
    rows: list[Row] = []
    out: IO[str] | None = options.json.open("w") if options.json else None
    progress = Progress(console=Console(stderr=True), transient=True)
    with progress:
        task = progress.add_task("zoo", total=len(chosen) * len(steps))
        for row in go_through(chosen, steps, limit=options.limit, workers=options.workers):
            rows.append(row)
            progress.update(task, advance=1, description=f"{row['name']} {row['step']}")
            if out:
                out.write(json.dumps(row) + "\n")
                out.flush()
    if out:
        out.close()
    if options.page:
        options.page.write_text(page(rows, version("transformers")))
    console = Console(width=120)
    console.print(summary(rows, lists if not options.only else list(LISTS)))
    told = failures(rows)
    if told.row_count:
        console.print(told)
    return _unexpected(rows)


def _unexpected(rows: list[Row]) -> int:
    """1 where a model has a reason that is not known, 0 else."""
    failed: list[Any] = [row["name"] for row in rows if "reason" in row]
    return int(any(name not in UNBUILDABLE for name in failed))


if __name__ == "__main__":
    sys.exit(main())
