"""What the launcher and its workers say to each other: words in a socket, values in files.

Functions are pickled by value. Only files of the launcher's own private folder are read: whoever
writes a pickle decides what reading it does.
"""

from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it ships no types
import torch

from shardproof.error_text import text_of
from shardproof.errors import UsageError

# What the user's code may raise while it is pickled; an interrupt is meant for the caller.
_WRONG = (Exception, SystemExit, GeneratorExit)
_SOME = 64 * 1024

# Files of the launcher's folder that all share.
SETTINGS = "settings"
STATUS_FILE = "status"
STORE = "store"
CALL = "call"

# What the launcher says, with the number of the call, and what a worker answers to RUN, with the
# same number: an answer to another call is none.
RUN, CLOSE = "run", "close"
RETURNED, FAILED = "returned", "failed"


def result_path(folder: Path, rank: int, number: int) -> Path:
    """Where rank `rank` leaves what `fn` returned in call `number`."""
    return folder / f"result-{rank}-{number}"


def failure_path(folder: Path, rank: int, number: int) -> Path:
    """Where rank `rank` leaves its failure in call `number`."""
    return folder / f"failure-{rank}-{number}"


def write(value: Any, path: Path, *, what: str) -> None:
    """Pickle `value`, its tensors unboxed, into `path`.

    Args:
        value: anything cloudpickle takes.
        path: is written.
        what: the value's name in the message.

    Raises:
        UsageError: it cannot be pickled, or there is no room for it.
    """
    try:
        torch.save(value, path, pickle_module=cloudpickle, pickle_protocol=5)
    except _WRONG as error:
        if isinstance(error, OSError | RuntimeError) and not _has_room(path):
            raise no_room(path, error) from error
        raise UsageError(
            f"{what} cannot be pickled, and must be to cross between processes: "
            f"{text_of(error)}. Create what cannot travel inside the function, "
            "return plain values or tensors, or use engine='threads'."
        ) from error


def read(path: Path, *, what: str) -> Any:
    """What `write` wrote.

    Raises:
        UsageError: it cannot be unpickled here.
    """
    try:
        return torch.load(path, weights_only=False)
    except _WRONG as error:
        raise UsageError(
            f"{what} cannot be unpickled: {text_of(error)}. What it needs must be "
            "importable here, or be defined in the script or notebook itself."
        ) from error


def no_room(path: Path, error: BaseException) -> UsageError:
    """The error for a folder of temporary files that takes nothing more."""
    return UsageError(
        f"{path} cannot be written: {text_of(error)}. What processes tell each other goes through "
        "that folder: make room in it, set TMPDIR to a directory that has some, or use "
        "engine='threads'."
    )


def _has_room(path: Path) -> bool:
    """Whether a file could still grow there; torch's own error does not say why it failed."""
    try:
        with path.open("ab") as file:
            file.write(bytes(_SOME))
            file.flush()
            file.truncate(0)
    except OSError:
        return False
    return True
