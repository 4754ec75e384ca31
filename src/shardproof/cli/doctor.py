"""`shardproof doctor`: what this machine offers, and whether invariant numerics can run on it."""

from collections.abc import Iterator
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from shardproof.cli.json_file import JsonFile
from shardproof.cli.machine import facts
from shardproof.cli.options import HELP_OPTIONS
from shardproof.cli.output import BAD, GOOD, PlainConsole, console, listed, size, yes_no

Row = tuple[str, str | Text]  # what, and its value


@click.command(context_settings=HELP_OPTIONS)
@click.option("--json", "json_path", metavar="FILE", help="Also write what is found to FILE.")
def doctor(json_path: str | None) -> int:
    """Show what this machine offers.

    torch, BLAS mode, threads, transports, GPUs and extras.

    Exit code 0 if invariant numerics (the same bits at every degree) can run here, else 1.
    """
    target = JsonFile(json_path) if json_path is not None else None
    found = facts()
    if target is not None:
        target.write(found)
    show(found, console())
    return 0 if found["invariant"] else 1


def show(found: dict[str, Any], out: PlainConsole) -> None:
    """Print the facts, one subject after the other, and the answer last."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for subject, rows in _subjects(found):
        for index, (what, value) in enumerate(rows):
            grid.add_row(subject if index == 0 else "", what, value)
        grid.add_row()
    out.show(grid)
    out.print(_verdict(found), soft_wrap=True)


def _subjects(found: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    python = f"{found['python']} on {found['system']}"
    yield "shardproof", [("version", found["shardproof"]), ("Python", python)]
    yield "torch", list(_torch(found["torch"]))
    yield "BLAS", list(_blas(found["blas"]))
    yield "threads", list(_threads(found["threads"]))
    yield "transports", list(_transports(found["transports"], found["processes_use"]))
    yield "GPUs", list(_gpus(found["gpus"]))
    yield "extras", list(_extras(found["extras"]))


def _torch(torch: dict[str, Any]) -> Iterator[Row]:
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU only"
    if torch["hip"]:
        build = f"ROCm {torch['hip']}"
    yield "version", torch["version"]
    yield "build", f"{build}, {'with' if torch['mkl'] else 'without'} MKL"
    yield "CPU", torch["cpu_capability"]


def _blas(blas: dict[str, Any]) -> Iterator[Row]:
    origin = "" if blas["from_environment"] else " (the default)"
    yield "asked", f"{blas['variable']}={blas['setting']}{origin}"
    yield "branch", blas["branch"]
    yield "took", yes_no(blas["took"]) + Text(_mkl_answer(blas))
    if blas["problem"]:
        yield "why not", blas["problem"]
    yield "self-check", _self_check(blas["self_check"])
    if blas["took"]:
        yield "contract", blas["contract"]


def _mkl_answer(blas: dict[str, Any]) -> str:
    if blas["return_code"] is None:
        return ""
    if blas["took"] and blas["branch"] in ("core", "leafwise"):
        return f" (MKL has no strict mode here: it answered {blas['return_code']})"
    return f" (MKL answered {blas['return_code']}, reads back {blas['read_back']:#x})"


def _self_check(result: str | None) -> Text:
    if result is None:
        return Text("not run: no strict mode to check")
    if result == "passed":
        return Text("passed", GOOD) + Text(": products of shards have the bits of full products")
    return Text("FAILED", BAD) + Text(f": {result}")


def _threads(threads: dict[str, Any]) -> Iterator[Row]:
    cores = str(threads["cores"])
    if threads["cores_allowed"] not in (None, threads["cores"]):
        cores = f"{threads['cores_allowed']} of {threads['cores']} for this process"
    yield "cores", cores
    omp = threads["omp_num_threads"]
    origin = f" (OMP_NUM_THREADS={omp})" if omp is not None else ""
    yield "intra-op", f"{threads['intra_op']}{origin}"


def _transports(transports: list[dict[str, Any]], processes_use: str | None) -> Iterator[Row]:
    for transport in transports:
        answer = Text("yes", GOOD) if transport["available"] else Text("no ")
        yield transport["name"], answer + Text(f"  {transport['why']}")
    if processes_use is None:
        yield "processes", 'launch(engine="processes") cannot run: no transport between processes'
    else:
        why = ", because shm cannot be used" if processes_use == "gloo" else ""
        yield "processes", f'launch(engine="processes") uses {processes_use}{why}'


def _gpus(gpus: list[dict[str, Any]]) -> Iterator[Row]:
    if not gpus:
        yield "none", "torch sees no GPU"
    for index, gpu in enumerate(gpus):
        memory = size(gpu["memory_bytes"])
        yield str(index), f"{gpu['name']}, {memory}, compute capability {gpu['capability']}"


def _extras(extras: dict[str, dict[str, bool]]) -> Iterator[Row]:
    if not extras:
        yield "unknown", "shardproof runs from its source tree, which does not list them"
    for extra, packages in extras.items():
        missing = [package for package, is_here in packages.items() if not is_here]
        if missing:
            way_out = f"pip install 'shardproof[{extra}]'"
            yield extra, f"no, without {listed(missing)}: {way_out}"
        else:
            yield extra, Text("yes", GOOD) + Text(f"  {listed(packages)}")


def _verdict(found: dict[str, Any]) -> Text:
    if found["invariant"]:
        return Text("invariant numerics can run here: the same bits at every degree", GOOD)
    return Text(f"invariant numerics cannot run here: {found['problem']}", BAD)
