"""Check that this machine can start the requested number of threads.

OpenMP ends the whole process, with exit code 1 or a crash, if it cannot start a thread. So the
number is limited, and as many threads are started once here, where a failure raises an error.
"""

import os
import threading

import torch

from shardproof.errors import UsageError
from shardproof.wording import short_repr

# More threads on one rank do not make anything faster, and OpenMP crashes far above this.
_LEAST_LIMIT, _PER_CORE = 256, 16
_MOST_IN_ALL = 4096

WAY_OUT = (
    "Use a lower degree or fewer threads, or raise the limits of this process (ulimit -u, -n and "
    "-v, the pids and the memory of its container)."
)

_tried = 1  # largest number of threads that ran at the same time, or is being tried
_trying = threading.Lock()


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def check_threads(threads: int, degree: int, *, setting_text: str) -> None:
    """Raise unless `degree` ranks of this machine can have `threads` threads each.

    Args:
        threads: number of threads of each rank.
        degree: number of ranks.
        setting_text: the option as the user wrote it, for the message.

    Raises:
        UsageError: the number is too large, or the system does not allow so many.
    """
    limit = max(_LEAST_LIMIT, _PER_CORE * cores())
    if threads > limit:
        raise UsageError(
            f"{setting_text} is more than {limit}, the most threads that one rank may have on this "
            f"machine ({cores()} cores). Use fewer; more than the cores gain nothing."
        )
    total = threads * degree
    most = max(_MOST_IN_ALL, _PER_CORE * cores())
    if total > most:
        raise UsageError(
            f"degree {short_repr(degree)} with {threads} threads on each rank is more than {most}, "
            f"the most threads in all that this machine ({cores()} cores) is asked for. Use a "
            "lower degree, fewer threads, or several machines under torchrun."
        )
    with _trying:
        _try(total)


def check_own_threads() -> None:
    """Raise unless this process can have the threads that torch took from the environment.

    Raises:
        UsageError: OMP_NUM_THREADS or MKL_NUM_THREADS asks for too many.
    """
    names = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)]
    settings = " and ".join(f"{name}={os.environ[name]}" for name in names)
    threads = torch.get_num_threads()
    check_threads(threads, 1, setting_text=settings or f"torch.get_num_threads() = {threads}")


def _try(total: int) -> None:
    """Start `total` threads at the same time, unless as many were started before."""
    global _tried
    if total <= _tried:
        return
    release = threading.Event()
    started: list[threading.Thread] = []
    try:
        while len(started) < total:
            thread = threading.Thread(target=release.wait, daemon=True)
            thread.start()
            started.append(thread)
        _tried = total
    except (RuntimeError, MemoryError) as error:
        raise UsageError(
            f"{total} threads are wanted on this machine, and only {len(started)} could be "
            f"started ({error}). {WAY_OUT}"
        ) from error
    finally:
        release.set()
        for thread in started:
            thread.join()
