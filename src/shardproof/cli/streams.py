"""Standard output as a place that may be closed, full or without a reader."""

import io
import os
import sys

from shardproof.errors import UsageError

_WAY_OUT = "Send it to a file, a terminal or /dev/null."


def require_stdout() -> None:
    """Raise if there is no standard output, before any work; make the streams fit for any text.

    Raises:
        UsageError: it was closed when the command began.
    """
    if sys.stderr is None:  # nobody is to be told anything; what is written goes nowhere
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until exit
    if sys.stdout is None or sys.stdout.closed:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until exit
        raise UsageError(f"standard output is closed, and the answer goes there. {_WAY_OUT}")
    for stream in (sys.stdout, sys.stderr):
        # Names of files and tensors may have letters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stdout_problem(error: BaseException) -> str | None:
    """What to say if an error came from standard output; None if it came from elsewhere."""
    if not isinstance(error, OSError):
        return None
    try:
        # What could not be written is still there, and fails again.
        sys.stdout.flush()
    except OSError as again:
        return f"standard output cannot be written: {again.strerror}. {_WAY_OUT}"
    return None


def give_up_stdout(code: int) -> int:
    """Let what is left go nowhere, so that the interpreter does not complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
