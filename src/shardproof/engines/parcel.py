"""What the launcher and its workers say to each other: words in a socket, values in files.

Functions are pickled by value. Only files of the launcher's own private folder are read: whoever
writes a pickle decides what reading it does.
"""

from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it ships no types
import torch

from shardproof.errors import UsageError

# Files of the launcher's folder that all share.
SETTINGS = "settings"
BOARD = "board"
STORE = "store"
CALL = "call"

# What the launcher says, and what a worker answers to RUN.
RUN, CLOSE = "run", "close"
RETURNED, FAILED = "returned", "failed"


def result_path(folder: Path, rank: int) -> Path:
    """Where rank `rank` leaves what `fn` returned."""
    return folder / f"result-{rank}"


def failure_path(folder: Path, rank: int) -> Path:
    """Where rank `rank` leaves its failure."""
    return folder / f"failure-{rank}"


def write(value: Any, path: Path, *, what: str) -> None:
    """Pickle `value`, its tensors unboxed, into `path`.

    Args:
        value: anything cloudpickle takes.
        path: is written.
        what: the value's name in the message.

    Raises:
        UsageError: it cannot be pickled.
    """
    try:
        torch.save(value, path, pickle_module=cloudpickle, pickle_protocol=5)
    except Exception as error:
        raise UsageError(
            f"{what} cannot be pickled, and must be to cross between processes: "
            f"{type(error).__name__}: {error}. Create what cannot travel inside the function, "
            "return plain values or tensors, or use engine='threads'."
        ) from error


def read(path: Path, *, what: str) -> Any:
    """What `write` wrote.

    Raises:
        UsageError: it cannot be unpickled here.
    """
    try:
        return torch.load(path, weights_only=False)
    except Exception as error:
        raise UsageError(
            f"{what} cannot be unpickled: {type(error).__name__}: {error}. What it needs must be "
            "importable here, or be defined in the script or notebook itself."
        ) from error
