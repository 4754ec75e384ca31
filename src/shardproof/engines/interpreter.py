"""Start a Python interpreter with this one's flags and without other inherited state.

Ignored or blocked signals (by nohup, or by a shell for its background jobs), closed standard
streams and a deleted working directory have no effect on the new interpreter.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from shardproof.errors import UsageError

# Runs before anything else is imported. Python itself ignores SIGPIPE and SIGXFSZ.
_BOOT = """
import sys
count = int(sys.argv[1])
sys.path[:] = sys.argv[2 : 2 + count]
del sys.argv[1 : 2 + count]
import signal
for each in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
    if signal.getsignal(each) is signal.SIG_IGN:
        is_interrupt = each == signal.SIGINT
        signal.signal(each, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
del count, each, signal
"""
_STANDARD = 3  # smaller descriptors are standard input, output and error


def command(code: str, *arguments: str) -> list[str]:
    """A command line that runs `code` with this process's sys.path and flags.

    Raises:
        UsageError: sys.executable does not name the interpreter.
    """
    if not sys.executable:
        raise UsageError(
            "engine='processes' starts Python interpreters, and sys.executable does not say "
            "which. Use engine='threads'."
        )
    path = search_path()
    start = [sys.executable, *flags(), "-c", _BOOT + code]
    return [*start, str(len(path)), *path, *arguments]


def flags() -> list[str]:
    """The options that this interpreter was started with, as multiprocessing hands them on."""
    options: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    for name, value in sys._xoptions.items():
        flag = name if value is True else f"{name}={value}"
        if flag not in options:
            options += ["-X", flag]
    return options


def search_path() -> list[str]:
    """sys.path as absolute paths; relative ones are left out if the working directory is gone."""
    here = directory()
    if here is None:
        return [entry for entry in sys.path if os.path.isabs(entry)]
    return [str(here / entry) for entry in sys.path]


def directory() -> Path | None:
    """The working directory, or None if it was deleted: MKL ends a process inside a deleted one."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def environment() -> dict[str, str]:
    """The environment without a relative PYTHONPATH, with which Python may fail to start.

    The search path is passed on the command line instead.
    """
    variables = dict(os.environ)
    entries = [each for each in variables.get("PYTHONPATH", "").split(os.pathsep) if each]
    absolute = [each for each in entries if os.path.isabs(each)]
    if absolute != entries:
        variables["PYTHONPATH"] = os.pathsep.join(absolute)
    return variables


def output(descriptor: int) -> int | None:
    """The standard output or error for a child: that of this process, or /dev/null."""
    try:
        os.fstat(descriptor)
    except OSError:  # closed here; the first file that the child opens would get its number
        return subprocess.DEVNULL
    return None


def above_standard(descriptor: int) -> int:
    """Duplicate a descriptor to a number above the standard streams, and close the old one."""
    if descriptor >= _STANDARD:
        return descriptor
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _STANDARD)
    os.close(descriptor)
    return moved
