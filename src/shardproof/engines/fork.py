"""What becomes of a fork of a rank that comes back from the rank's function.

The function runs once on every rank. A child that the function has forked, and that returns from
it or raises in it, is not the rank: it must not answer for it, nor serve its next call.
"""

import os
import sys
from typing import NoReturn

from shardproof.error_text import describe_error


def end_if_forked(owner: int, rank: int, error: BaseException | None = None) -> None:
    """Nothing in the rank itself; a fork of it says what is wrong, and ends.

    Args:
        owner: the process that began the call.
        rank: that it is.
        error: what the function raised, if it did.
    """
    if os.getpid() != owner:
        _end(owner, rank, error)


def _end(owner: int, rank: int, error: BaseException | None) -> NoReturn:
    code = 1
    try:
        if isinstance(error, SystemExit):  # the child wants to end, and says with which code
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
        os._exit(code)  # nothing that would be done at the end of the process is the child's to do


def flush() -> None:
    """Write out what is printed; a process may have neither output."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)
