"""`shardproof doctor`: what this machine offers, and whether invariant numerics can run on it."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from typing import Any

import click
import torch
from rich.text import Text

from shardproof import __version__
from shardproof.cli.options import HELP_OPTIONS, json_option
from shardproof.cli.output import (
    BAD,
    GOOD,
    PlainConsole,
    console,
    grouped,
    listed,
    size,
    yes_no,
)
from shardproof.cli.output_file import OutputFile
from shardproof.errors import NumericsError
from shardproof.extras import install_command
from shardproof.numerics import mode
from shardproof.scheme import Scheme
from shardproof.transport.choose import shm_problem
from shardproof.transport.threads import waits_note

PACKAGE = "shardproof"
_EXTRA = re.compile(r"([A-Za-z0-9._-]+).*;.*extra\s*==\s*['\"]([A-Za-z0-9._-]+)['\"]")

Row = tuple[str, str | Text]


@click.command(context_settings=HELP_OPTIONS)
@json_option("what is found")
def doctor(json_file: OutputFile | None) -> int:
    """Show what this machine offers.

    torch, BLAS mode, threads, transports, GPUs and extras.

    Exit code 0 if invariant numerics (the same bits at every degree) can run here, else 1.
    """
    facts = machine_facts()
    if json_file is not None:
        json_file.write(facts)
    show(facts, console())
    return 0 if facts["invariant"] else 1


def machine_facts() -> dict[str, Any]:
    """Everything that `shardproof doctor` knows, ready for JSON."""
    problem = _invariant_problem()
    return {
        "invariant": problem is None,
        "problem": problem,
        "shardproof": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": _torch_facts(),
        "blas": _blas_facts(),
        "threads": _thread_facts(),
        "transports": transports(),
        "processes_use": _processes_use(),
        "gpus": _gpu_facts(),
        "extras": extra_packages(),
    }


def _invariant_problem() -> str | None:
    """Why invariant numerics cannot run in this process, or None."""
    try:
        mode.require_invariant()
    except NumericsError as error:
        return str(error)
    return None


def _torch_facts() -> dict[str, Any]:
    """Version and build of torch."""
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "mkl": torch.backends.mkl.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _blas_facts() -> dict[str, Any]:
    """The BLAS mode: the setting, the answer of the library, and the result of the self-check."""
    state = mode.set_blas_mode()
    checked = state.took and state.is_strict
    difference = mode.self_check() if checked else None
    return {
        "variable": mode.VARIABLE,
        "setting": state.setting,
        "from_environment": mode.VARIABLE in os.environ,
        "branch": state.branch,
        "took": state.took,
        "return_code": state.return_code,
        "read_back": state.read_back,
        "problem": state.problem,
        "self_check": (difference or "passed") if checked else None,
        "contract": mode.contract(Scheme()),
    }


def _thread_facts() -> dict[str, Any]:
    """How many cores this process may use, and how many threads one torch operation takes."""
    return {
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "intra_op": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def transports() -> list[dict[str, Any]]:
    """Every transport: whether it works here, and why or why not."""
    threads = "ranks are threads of one process"
    return [
        _transport("solo", None, "degree 1: nothing is exchanged"),
        _transport("threads", None, "; ".join(filter(None, (threads, waits_note())))),
        _transport("shm", shm_problem(), "ranks are processes, on CPUs of one machine"),
        _transport("gloo", _gloo_problem(), "ranks are processes, on CPU"),
        _transport("nccl", _nccl_problem(), "ranks are processes, one GPU each"),
    ]


def _transport(name: str, problem: str | None, what: str) -> dict[str, Any]:
    return {"name": name, "available": problem is None, "why": problem or what}


def _processes_use() -> str | None:
    """The default transport of `launch(engine="processes")`; None without gloo."""
    if _gloo_problem() is not None:
        return None
    return "gloo" if shm_problem() is not None else "shm"


def _gloo_problem() -> str | None:
    if not torch.distributed.is_available():
        return "this torch was built without torch.distributed"
    if not torch.distributed.is_gloo_available():
        return "this torch was built without gloo"
    return None


def _nccl_problem() -> str | None:
    if not torch.distributed.is_available():
        return "this torch was built without torch.distributed"
    if not torch.distributed.is_nccl_available():
        return "this torch was built without NCCL"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def _gpu_facts() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    indices = range(torch.cuda.device_count())
    return [
        {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in map(torch.cuda.get_device_properties, indices)
    ]


def extra_packages() -> dict[str, dict[str, bool]]:
    """Extra -> package that it brings -> whether that package is here."""
    extras: dict[str, dict[str, bool]] = {}
    for requirement in _requirements():
        match = _EXTRA.match(requirement)
        if match and match[1] != PACKAGE:
            extras.setdefault(match[2], {})[match[1]] = _is_installed(match[1])
    return extras


def _requirements() -> list[str]:
    """The requirements of the installed package; none if it runs from its source tree."""
    try:
        return importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def show(facts: dict[str, Any], out: PlainConsole) -> None:
    """Print the facts, one subject after the other, and the answer last."""
    out.show(grouped(_subjects(facts), style="bold", has_gaps=True))
    out.whole_line(_verdict(facts))


def _subjects(facts: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    python = f"{facts['python']} on {facts['system']}"
    yield "shardproof", [("version", facts["shardproof"]), ("Python", python)]
    yield "torch", list(_torch(facts["torch"]))
    yield "BLAS", list(_blas(facts["blas"]))
    yield "threads", list(_threads(facts["threads"]))
    yield "transports", list(_transports(facts["transports"], facts["processes_use"]))
    yield "GPUs", list(_gpus(facts["gpus"]))
    yield "extras", list(_extras(facts["extras"]))


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
            yield extra, f"no, without {listed(missing)}: {install_command([extra])}"
        else:
            yield extra, Text("yes", GOOD) + Text(f"  {listed(packages)}")


def _verdict(facts: dict[str, Any]) -> Text:
    if facts["invariant"]:
        return Text("invariant numerics can run here: the same bits at every degree", GOOD)
    return Text(f"invariant numerics cannot run here: {facts['problem']}", BAD)
