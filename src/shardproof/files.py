"""Open files of the user without waiting, read them up to a limit, and parse JSON strictly.

Reports, configs, indices and weights are all read by this module. So a named pipe, a device, a
directory, an endless file or endlessly nested JSON gives a clear error. Links are followed, because
the caches of Hugging Face consist of links.
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
from shardproof.wording import short_repr, short_text

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def path_of(path: Any, *, what: str, way_out: str) -> Path:
    """Convert a path argument of a user.

    Raises:
        UsageError: it is not a path, or empty, or has an invalid character.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise UsageError(f"{what} is {short_repr(path)}, which is not a path. {way_out}")
    text = os.fspath(path)
    if not text or "\0" in text:
        kind = "empty" if not text else f"{short_repr(text)}, and no path has a zero byte"
        raise UsageError(f"{what} is {kind}. {way_out}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(
            f"{what} is {short_repr(text)}, and no path has such a character. {way_out}"
        ) from None
    return Path(text)


def check_regular(path: Path, *, what: str, way_out: str) -> None:
    """Raise unless a path is a regular file that can be opened; never waits for a pipe.

    Args:
        path: path of the file.
        what: the file in the user's words, with the path ("--against report.json").
        way_out: a sentence that says what to do.

    Raises:
        UsageError: it is missing, unreadable, or not a regular file.
    """
    os.close(_opened(path, what, way_out)[0])


def read_text(path: Path, *, what: str, way_out: str, largest: int) -> str:
    """Read a regular file as text.

    Args:
        path: of the file.
        what: as in `check_regular`.
        way_out: as in `check_regular`.
        largest: largest number of bytes.

    Raises:
        UsageError: as in `check_regular`; or it is too large, or not UTF-8.
    """
    data = read_bytes(path, what=what, way_out=way_out, largest=largest)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{what} is not JSON: it is not text. {way_out}") from None


def read_bytes(path: Path, *, what: str, way_out: str, largest: int) -> bytes:
    """Read a regular file.

    Args:
        path: of the file.
        what: as in `check_regular`.
        way_out: as in `check_regular`.
        largest: largest number of bytes.

    Raises:
        UsageError: as in `check_regular`; or it is too large.
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
    return data


def read_json(
    path: Path, *, what: str, way_out: str, largest: int, only_finite: bool = True
) -> Any:
    """Read JSON from a regular file.

    A repeated key, a number that is too long and, unless `only_finite` is False, a number that is
    not finite are errors, because they can be read in several ways.

    Args:
        path: of the file.
        what: as in `check_regular`.
        way_out: as in `check_regular`.
        largest: as in `read_text`.
        only_finite: whether NaN and Infinity are refused; transformers writes them into configs.

    Raises:
        UsageError: as in `read_text`; or it is not JSON.
    """
    text = read_text(path, what=what, way_out=way_out, largest=largest)
    try:
        return parse_json(text, only_finite=only_finite)
    except ValueError as error:
        raise UsageError(f"{what} is not JSON ({error}). {way_out}") from None


def parse_json(text: str, *, only_finite: bool = True) -> Any:
    """Parse JSON as strictly as `read_json` does.

    Args:
        text: the JSON.
        only_finite: as in `read_json`.

    Raises:
        ValueError: it is not JSON; the message is the reason.
    """
    options: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite}
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=_whole, **(options if only_finite else {})
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Strange(ValueError):  # noqa: N818 - never seen outside of this file
    """JSON that is ambiguous or cannot be read."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _Strange(f"the key {short_repr(twice)} is there twice")
    return unique


def _whole(text: str) -> int:
    if len(text) > 1000:
        raise _Strange(f"a number has {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Strange(f"the number {short_text(text, most=40)} is not finite")
    return number


def _no_constant(text: str) -> float:
    raise _Strange(f"{text} is no JSON")


def _opened(path: Path, what: str, way_out: str) -> tuple[int, int]:
    """Open a regular file; return its descriptor and its size."""
    try:
        # Checked before it is opened, because opening a device can have effects.
        if stat.S_ISREG(kind := path.stat().st_mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} cannot be read: {why(error)}. {way_out}") from None
    _require_regular(kind, what, way_out)
    status = os.fstat(descriptor)
    try:
        _require_regular(status.st_mode, what, way_out)  # the path may be another file by now
    except UsageError:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _require_regular(kind: int, what: str, way_out: str) -> None:
    if not stat.S_ISREG(kind):
        name = next((name for is_kind, name in _KINDS if is_kind(kind)), "no file")
        raise UsageError(f"{what} is {name}, not a regular file. {way_out}")


def why(error: BaseException) -> str:
    """The reason of a system error, in words."""
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "it is a link that leads back to itself"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return short_text(str(error), most=200)
