"""What this machine offers shardproof, as plain data: no tables here, and nothing is changed."""

import importlib.metadata
import os
import platform
import re
from typing import Any

import torch

from shardproof import __version__
from shardproof.errors import NumericsError
from shardproof.numerics import mode
from shardproof.scheme import Scheme
from shardproof.transport.choose import shm_problem
from shardproof.transport.threads import waits_note

PACKAGE = "shardproof"

_THREADS = "ranks are threads of one process"

_EXTRA = re.compile(r"([A-Za-z0-9._-]+).*;.*extra\s*==\s*['\"]([A-Za-z0-9._-]+)['\"]")


def facts() -> dict[str, Any]:
    """Everything that `shardproof doctor` knows, ready for JSON."""
    problem = invariant_problem()
    return {
        "invariant": problem is None,
        "problem": problem,
        "shardproof": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch_facts(),
        "blas": blas_facts(),
        "threads": thread_facts(),
        "transports": transports(),
        "processes_use": _processes_use(),
        "gpus": gpus(),
        "extras": extras(),
    }


def invariant_problem() -> str | None:
    """Why invariant numerics cannot run in this process, or None."""
    try:
        mode.require_invariant()
    except NumericsError as error:
        return str(error)
    return None


def torch_facts() -> dict[str, Any]:
    """Version and build of torch."""
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "mkl": torch.backends.mkl.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def blas_facts() -> dict[str, Any]:
    """What was asked of the BLAS library, what it answered, and what the self-check found."""
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


def thread_facts() -> dict[str, Any]:
    """How many cores this process may use, and how many threads one torch operation takes."""
    return {
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "intra_op": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def transports() -> list[dict[str, Any]]:
    """Every transport: whether it works here, and why or why not."""
    return [
        _transport("solo", None, "degree 1: nothing is exchanged"),
        _transport("threads", None, "; ".join(filter(None, (_THREADS, waits_note())))),
        _transport("shm", shm_problem(), "ranks are processes, on CPUs of one machine"),
        _transport("gloo", _gloo_problem(), "ranks are processes, on CPU"),
        _transport("nccl", _nccl_problem(), "ranks are processes, one GPU each"),
    ]


def _transport(name: str, problem: str | None, what: str) -> dict[str, Any]:
    return {"name": name, "available": problem is None, "why": problem or what}


def _processes_use() -> str | None:
    """What `launch(engine="processes")` takes by itself; the processes meet through gloo."""
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


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in found
    ]


def extras() -> dict[str, dict[str, bool]]:
    """Extra -> package that it brings -> whether that package is here."""
    found: dict[str, dict[str, bool]] = {}
    for requirement in _requirements():
        match = _EXTRA.match(requirement)
        if match and match[1] != PACKAGE:
            found.setdefault(match[2], {})[match[1]] = _is_installed(match[1])
    return found


def _requirements() -> list[str]:
    """What the installed package says it needs; nothing if it runs from its source tree."""
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
