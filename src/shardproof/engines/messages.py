"""Messages between the launcher and its workers: words over a socket, pickled values in files.

Functions are pickled by value. Only files in the launcher's own private folder are read, because
reading a pickle can run any code.
"""

from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it ships no types
import torch

from shardproof.error_text import text_of
from shardproof.errors import UsageError

# Errors that pickling the user's objects may raise; an interrupt is not among them.
_WRONG = (Exception, SystemExit, GeneratorExit)
_SOME = 64 * 1024

# Shared files in the launcher's folder.
SETTINGS = "settings"
STATUS_FILE = "status"
STORE = "store"
CALL = "call"

# Words of the launcher, sent with the number of a call, and answers of a worker to RUN, with the
# same number. An answer with another number is ignored.
RUN, CLOSE = "run", "close"
RETURNED, FAILED = "returned", "failed"


def result_path(folder: Path, rank: int, number: int) -> Path:
    """The file for the result of rank `rank` in call `number`."""
    return folder / f"result-{rank}-{number}"


def failure_path(folder: Path, rank: int, number: int) -> Path:
    """The file for the failure of rank `rank` in call `number`."""
    return folder / f"failure-{rank}-{number}"


def write(value: Any, path: Path, *, what: str) -> None:
    """Pickle `value`, its tensors unboxed, into `path`.

    Args:
        value: any value that cloudpickle can pickle.
        path: the file to write.
        what: name of the value in messages.

    Raises:
        UsageError: it cannot be pickled, or the disk is full.
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
    """Read a value that `write` wrote.

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
    """The error for a full folder of temporary files."""
    return UsageError(
        f"{path} cannot be written: {text_of(error)}. What processes tell each other goes through "
        "that folder: make room in it, set TMPDIR to a directory that has some, or use "
        "engine='threads'."
    )


def _has_room(path: Path) -> bool:
    """Whether a file in the folder can still grow, because torch's own error does not say so."""
    try:
        with path.open("ab") as file:
            file.write(bytes(_SOME))
            file.flush()
            file.truncate(0)
    except OSError:
        return False
    return True
