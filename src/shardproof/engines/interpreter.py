"""How an interpreter of our own is started: with this one's flags, and nothing that happens to be.

What a process inherits besides its environment decides nothing: signals that are ignored or blocked
(by nohup, or by a shell for its background jobs), closed standard streams, a working directory that
is gone.
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
_STANDARD = 3  # standard input, output and error are below


def command(code: str, *arguments: str) -> list[str]:
    """A command line that runs `code` with this process's sys.path and flags.

    Raises:
        UsageError: this process does not know its interpreter.
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
        written = name if value is True else f"{name}={value}"
        if written not in options:
            options += ["-X", written]
    return options


def search_path() -> list[str]:
    """sys.path, absolute; without what is relative to a working directory that is gone."""
    here = directory()
    if here is None:
        return [entry for entry in sys.path if os.path.isabs(entry)]
    return [str(here / entry) for entry in sys.path]


def directory() -> Path | None:
    """The working directory, or None if it is gone; in one that is gone, MKL ends the process."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def environment() -> dict[str, str]:
    """The environment; a relative PYTHONPATH is left out, for Python cannot start without a place.

    The search path is handed on in another way.
    """
    variables = dict(os.environ)
    entries = [each for each in variables.get("PYTHONPATH", "").split(os.pathsep) if each]
    absolute = [each for each in entries if os.path.isabs(each)]
    if absolute != entries:
        variables["PYTHONPATH"] = os.pathsep.join(absolute)
    return variables


def output(descriptor: int) -> int | None:
    """What a child gets as its standard output or error: this process's own, or nothing."""
    try:
        os.fstat(descriptor)
    except OSError:  # closed; what the child opens first would be taken for it
        return subprocess.DEVNULL
    return None


def above_standard(descriptor: int) -> int:
    """The same file by a number that no library writes to by itself; closes the old one."""
    if descriptor >= _STANDARD:
        return descriptor
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _STANDARD)
    os.close(descriptor)
    return moved
