"""End a fork of a rank that returns from the rank's function.

The function runs once on every rank. If it forks a child process, and the child returns from the
function or raises in it, the child must not report a result for the rank or serve its next call.
"""

import os
import sys
from typing import NoReturn

from shardproof.error_text import describe_error


def end_if_forked(owner: int, rank: int, error: BaseException | None = None) -> None:
    """Do nothing in the rank itself; in a fork of it, print an error and end the process.

    Args:
        owner: id of the process that began the call.
        rank: the rank.
        error: the exception that the function raised, or None.
    """
    if os.getpid() != owner:
        _end(owner, rank, error)


def _end(owner: int, rank: int, error: BaseException | None) -> NoReturn:
    code = 1
    try:
        if isinstance(error, SystemExit):  # the child called sys.exit with this code
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            _say(describe_error(error, error.__traceback__).trace)
        else:
            _say(
                f"error: process {os.getpid()} is a fork of rank {rank} (process {owner}) and has "
                "returned from the rank's function. Only the rank answers for it. End a fork with "
                "os._exit(code), or use multiprocessing or subprocess.\n"
            )
        flush()
    finally:
        os._exit(code)  # the child must not run the exit handlers of the rank's process


def flush() -> None:
    """Flush standard output and error, which a process may lack."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)
