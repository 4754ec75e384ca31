"""Where a bench ran, as plain data for its report."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shardproof import core
from shardproof.bench.systems.catalog import SYSTEMS

# What is installed under another name than it is imported.
DISTRIBUTIONS = {"megatron": "megatron-core"}


def environment() -> dict[str, Any]:
    """Machine, versions and what may slow a system down here."""
    return {
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "shardproof": importlib.metadata.version("shardproof"),
        "core": core.problem() or "built",
        "dtype": "float32",
        "peers": dict(_peers()),
    }


def _cpu() -> str:
    """What Linux calls the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peers() -> Iterator[tuple[str, str]]:
    """Versions of the peers that are installed."""
    for system in SYSTEMS:
        if system.package is not None and system.problem() is None:
            name = DISTRIBUTIONS.get(system.package, system.package)
            yield system.name, importlib.metadata.version(name)
