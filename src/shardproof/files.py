"""Files that somebody else wrote: opened without waiting, read up to a limit, parsed strictly.

Everything that reads a report, a config, an index or weights comes through here, so that a named
pipe, a device, a directory, a file without end or JSON that is nested without end is one error.
A link is followed: the caches of Hugging Face are made of links.
"""

import errno
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardproof.errors import UsageError
from shardproof.wording import shown, written

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def path_of(path: Any, *, what: str, way_out: str) -> Path:
    """A path as a user gave it.

    Raises:
        UsageError: it is no path, or empty, or has a character that no path can have.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise UsageError(f"{what} is {shown(path)}, which is not a path. {way_out}")
    text = os.fspath(path)
    if not text or "\0" in text:
        kind = "empty" if not text else f"{shown(text)}, and no path has a zero byte"
        raise UsageError(f"{what} is {kind}. {way_out}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(
            f"{what} is {shown(text)}, and no path has such a character. {way_out}"
        ) from None
    return Path(text)


def check_regular(path: Path, *, what: str, way_out: str) -> None:
    """Raise unless there is a regular file that can be opened; never waits for a pipe.

    Args:
        path: of the file.
        what: it is called by the user, with the path ("--against report.json").
        way_out: one sentence.

    Raises:
        UsageError: it is missing, unreadable, or something else than a regular file.
    """
    os.close(_opened(path, what, way_out)[0])


def read_text(path: Path, *, what: str, way_out: str, largest: int) -> str:
    """All of a regular file as text.

    Args:
        path: of the file.
        what: as in `check_regular`.
        way_out: as in `check_regular`.
        largest: bytes above which it is not read.

    Raises:
        UsageError: as `check_regular` does; it is too large, or no UTF-8.
    """
    descriptor, size = _opened(path, what, way_out)
    with open(descriptor, "rb", closefd=True) as file:
        try:
            data = b"" if size > largest else file.read(largest + 1)
        except (OSError, OverflowError) as error:
            raise UsageError(f"{what} cannot be read: {why(error)}. {way_out}") from None
    if size > largest or len(data) > largest:
        raise UsageError(
            f"{what} has {max(size, len(data)):,} bytes, and no such file has more than "
            f"{largest:,}. {way_out}"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{what} is not JSON: it is not text. {way_out}") from None


def read_json(
    path: Path, *, what: str, way_out: str, largest: int, only_finite: bool = True
) -> Any:
    """What the JSON in a regular file says.

    Strict: a key that is there twice, a number too long to read and, unless `only_finite` is off,
    one that is not finite are errors, for whoever wrote them meant one thing and we might take
    another.

    Args:
        path: of the file.
        what: as in `check_regular`.
        way_out: as in `check_regular`.
        largest: as in `read_text`.
        only_finite: False lets NaN and Infinity pass, which transformers writes into configs.

    Raises:
        UsageError: as `read_text` does; it is not JSON.
    """
    text = read_text(path, what=what, way_out=way_out, largest=largest)
    options: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite}
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=_whole, **(options if only_finite else {})
        )
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, line {error.lineno}, column {error.colno}"
    except RecursionError:
        reason = "it is nested too deeply"
    except _Strange as error:
        reason = str(error)
    raise UsageError(f"{what} is not JSON ({reason}). {way_out}") from None


class _Strange(ValueError):  # noqa: N818 - never seen outside of this file
    """JSON that can be read in more than one way, or in none."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _Strange(f"the key {shown(twice)} is there twice")
    return unique


def _whole(text: str) -> int:
    if len(text) > 1000:
        raise _Strange(f"a number has {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Strange(f"the number {written(text, most=40)} is not finite")
    return number


def _no_constant(text: str) -> float:
    raise _Strange(f"{text} is no JSON")


def _opened(path: Path, what: str, way_out: str) -> tuple[int, int]:
    """A descriptor of a regular file, and its size."""
    try:
        # Looked at before it is opened: to open a device can do something.
        if stat.S_ISREG(kind := path.stat().st_mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} cannot be read: {why(error)}. {way_out}") from None
    _require_regular(kind, what, way_out)
    status = os.fstat(descriptor)
    try:
        _require_regular(status.st_mode, what, way_out)  # it may be another file by now
    except UsageError:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _require_regular(kind: int, what: str, way_out: str) -> None:
    if not stat.S_ISREG(kind):
        name = next((name for is_kind, name in _KINDS if is_kind(kind)), "no file")
        raise UsageError(f"{what} is {name}, not a regular file. {way_out}")


def why(error: BaseException) -> str:
    """What the system said."""
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "it is a link that leads back to itself"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return written(str(error), most=200)
