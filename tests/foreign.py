"""Values that a person may hand over where something else is wanted, and what must come of it."""

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shardproof.errors import ShardproofError

LONGEST = 2000  # characters of a message about one thing
DEADLINE = 10


class Mute:
    """Nothing can be said of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Flood:
    """Five megabytes can be said of it."""

    def __repr__(self) -> str:
        return "F" * 5_000_000


def inside_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


# Name -> value, none of them a number, a name, a module, a plan or a tensor that fits anywhere.
ODD: dict[str, Any] = {
    "an object": object(),
    "mute": Mute(),
    "flood": Flood(),
    "nan": float("nan"),
    "complex": 1j,
    "bytes": b"x",
    "a list of a list of itself": inside_itself(),
    "a set": {1},
    "a module of Python": nn,
    "a tensor of two": torch.tensor([1, 2]),
    "a float of numpy": np.float32(1.5),
    "a huge number": 10**5000,
    "a huge negative number": -(10**5000),
    "a function": lambda: 1,
    "NotImplemented": NotImplemented,
}


class LateError(BaseException):
    """It took too long."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Fail if the block takes longer than anybody waits; a wait for a pipe is ended."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise LateError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(DEADLINE * 3)  # a busy machine is slow, not wrong
    try:
        yield
    except LateError:
        pytest.fail("took too long")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(do: Callable[[], object]) -> ShardproofError:
    """The error of ours that `do` raises, in time, and short."""
    with in_time(), pytest.raises(ShardproofError) as caught:
        do()
    assert len(str(caught.value)) < LONGEST, str(caught.value)[:300]
    return caught.value


def outcomes(table: dict[str, tuple[Callable[[], object], str]]) -> dict[str, str]:
    """Label -> what is wrong, of all entries that are not refused with a text that matches."""
    wrong = {}
    for label, (do, pattern) in table.items():
        try:
            with in_time():
                got = do()
            wrong[label] = f"accepted: {type(got).__name__}"
        except ShardproofError as error:
            if not re.search(pattern, str(error)):
                wrong[label] = f"says {str(error)[:300]}"
            elif len(str(error)) >= LONGEST:
                wrong[label] = f"says {len(str(error))} characters"
        except Exception as error:
            wrong[label] = f"raised {type(error).__name__}: {str(error)[:100]}"
    return wrong


def odd_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> path, and what a message about a file to read says of it."""
    (folder / "directory").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    return {
        "a directory": (str(folder / "directory"), "is a directory"),
        "a loop of links": (str(folder / "loop"), "link that leads back to itself"),
        "a link to nothing": (str(folder / "dangling"), "No such file"),
        "a pipe": (str(folder / "pipe"), "is a named pipe"),
        "no end": ("/dev/zero", "is a device"),
        "nothing": ("/dev/null", "is a device"),
        "a file as a directory": (f"{__file__}/x", "Not a directory"),
        "a long name": ("x" * 5000, "File name too long"),
        "a long path": ("/".join(["x" * 200] * 30), "File name too long"),
        "a zero byte": ("a\0b", "zero byte"),
        "an empty name": ("", "empty"),
        "a half letter": ("\ud800", "no path has such a character"),
        "no UTF-8": ("a\udcff", "No such file"),
        "memory": ("/proc/self/mem", "cannot be read|is not text|is not JSON"),
    }
