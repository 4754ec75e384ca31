"""Standard output as a place that may be closed, full or without a reader."""

import io
import os
import sys
from typing import Any

from shardproof.errors import UsageError

_WAY_OUT = "Send it to a file, a terminal or /dev/null."


class OutputError(UsageError):
    """Standard output cannot be written."""


class ReaderLeftError(Exception):
    """Nobody reads standard output any more; no `OSError`, of which click makes exit code 1."""


class _Output(io.TextIOWrapper):
    """Standard output, whose errors say that it was standard output that failed.

    The errors of a full disk would look like those of any other file.
    """

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _named(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _named(error) from error


def prepare_streams() -> None:
    """Make the standard streams fit for any text and any end.

    Raises:
        OutputError: standard output was closed when the command began.
    """
    if sys.stderr is None:  # nobody wants to be told anything
        sys.stderr = _nowhere()
    if sys.stdout is None or sys.stdout.closed:
        sys.stdout = _nowhere()
        raise OutputError(f"standard output is closed, and the answer goes there. {_WAY_OUT}")
    out: Any = sys.stdout
    if out is sys.__stdout__ and isinstance(out, io.TextIOWrapper):
        # Names of files and tensors may have letters that the terminal's encoding lacks.
        sys.stdout = _Output(
            out.buffer,
            encoding=out.encoding,
            errors="backslashreplace",
            line_buffering=out.line_buffering,
            write_through=out.write_through,
        )


def give_up_stdout() -> None:
    """Let what is left go nowhere, so that the interpreter does not complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _named(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):
        return ReaderLeftError()
    return OutputError(f"standard output cannot be written: {error.strerror}. {_WAY_OUT}")


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")
