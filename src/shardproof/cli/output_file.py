"""The files of a command: reports that it reads, and files that it writes.

Whether a file can be written is tried before the work and not after it.
"""

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from shardproof import extras, files
from shardproof.errors import UsageError
from shardproof.prover.compare_reports import fault_of
from shardproof.wording import short_repr, short_text, spelt_out

# Hashes of 10,000 tensors at 8 degrees are some 10 MB; what is larger was not made by us, and
# JSON takes up to twenty times its size when it is read.
LARGEST_REPORT = 64 << 20
PICTURES = (".png", ".svg", ".pdf")


class OutputFile:
    """A file for one document, JSON or other text.

    A regular file is replaced at once when the document is complete, so that a run that fails or
    is interrupted leaves an earlier report as it was. Anything else (/dev/stdout, a pipe) is
    written as it is.

    Attributes:
        path: as the user wrote it, on one line.

    Raises:
        UsageError: the file could not be written.
    """

    def __init__(self, text: str, *, option: str = "--json") -> None:
        self.path = short_text(text)
        self._what = f"{option} {self.path}"
        way_out = f"Name a file, for instance {option} report.json."
        path = files.path_of(text, what=option, way_out=way_out)
        self._descriptor: int | None = None
        try:
            if path.is_dir():
                raise UsageError(
                    f"{self._what} is a directory. Name a file, for instance "
                    f"{option} {short_text(str(path / 'report.json'))}."
                )
            self._is_special = path.exists() and not path.is_file()
            self._path = path if self._is_special else path.resolve()
            if not self._path.parent.is_dir():
                raise UsageError(
                    f"{self._what}: there is no directory {short_text(str(self._path.parent))}. "
                    f"Create it first, or name a file elsewhere."
                )
            self._try()
        except (OSError, RuntimeError) as error:  # a link that leads to itself is a RuntimeError
            raise UsageError(
                f"{self._what} cannot be written: {files.why(error)}. "
                f"Name a file in a directory where you may create files."
            ) from None

    def _try(self) -> None:
        if self._is_special:
            self._open_special()
            return
        if self._path.exists() and not os.access(self._path, os.W_OK):
            raise UsageError(
                f"{self._what} cannot be written: the file is write-protected. "
                f"Make it writable, or name another file."
            )
        self._draft.open("xb").close()
        self._draft.unlink()

    def _open_special(self) -> None:
        """Open a pipe or a terminal without waiting; a pipe without a reader is an error.

        It stays open until the document is complete, or a pipe's reader would leave.
        """
        kind = self._path.stat().st_mode
        if stat.S_ISBLK(kind):
            raise UsageError(
                f"{self._what} is a disk, of which a report would overwrite the start. Name a file."
            )
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if stat.S_ISFIFO(kind) and error.errno == errno.ENXIO:
                raise UsageError(
                    f"{self._what} is a named pipe that nobody reads. Start its reader first, or "
                    "name a file."
                ) from None
            raise
        os.set_blocking(self._descriptor, True)

    def is_same(self, other: "OutputFile") -> bool:
        """Whether both are one regular file, so that one would replace the other."""
        return self.is_replaced and other.is_replaced and self._path == other._path

    @property
    def is_replaced(self) -> bool:
        """True if a later document replaces an earlier one; in a pipe it follows it."""
        return not self._is_special

    @property
    def _draft(self) -> Path:
        return self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")

    def write(self, document: dict[str, Any]) -> None:
        """Write a document as JSON, as a whole or not at all.

        Raises:
            UsageError: the disk is full, or the place is gone since the first look.
        """
        self.write_text(json.dumps(spelt_out(document), indent=1, allow_nan=False) + "\n")

    def write_text(self, text: str) -> None:
        """Write text, as a whole or not at all.

        Raises:
            UsageError: as for `write`.
        """
        try:
            if self._is_special:
                self._write_special(text.encode())
                return
            try:
                self._draft.write_text(text, encoding="utf-8")
                if self._path.exists():
                    shutil.copymode(self._path, self._draft)
                self._draft.replace(self._path)
            finally:
                self._draft.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self._what} could not be written: {error.strerror}. Name another file."
            ) from error

    def _write_special(self, data: bytes) -> None:
        if self._descriptor is None:  # a second document follows the first
            self._open_special()
        descriptor, self._descriptor = self._descriptor, None
        with open(descriptor, "wb") as file:  # type: ignore[arg-type]
            file.write(data)


def check_different(page: OutputFile | None, report: OutputFile | None) -> None:
    """Raise if --html and --json are one file."""
    if page is not None and report is not None and page.is_same(report):
        raise UsageError(
            f"--html and --json are both {page.path}, and one would replace the other. "
            "Name two files."
        )


def read_report(text: str, *, option: str = "--against") -> dict[str, Any]:
    """An earlier report.

    Raises:
        UsageError: the file cannot be read, is not JSON, or is no report of `shardproof prove`
            that something can be compared with.
    """
    way_out = "Name a file that `shardproof prove --json FILE` wrote."
    path = files.path_of(text, what=option, way_out=way_out)
    what = f"{option} {short_text(text)}"
    report = files.read_json(path, what=what, way_out=way_out, largest=LARGEST_REPORT)
    fault = fault_of(report)
    if fault:
        raise UsageError(f"{what} is not a report: {fault}. {way_out}")
    return dict(report)


def checked_picture(text: str, *, is_installed: bool, example: str) -> Path:
    """Where the picture of --plot goes.

    Args:
        text: as the user wrote it.
        is_installed: whether there is something to draw with.
        example: a file name for messages.

    Raises:
        UsageError: it could not be drawn or written.
    """
    if Path(text).suffix not in PICTURES:
        raise UsageError(
            f"--plot {short_repr(text)} does not end in .png, .svg and .pdf, which say how to "
            f"draw. Name a file, for instance --plot {example}."
        )
    what = f"--plot {short_text(text)}"
    if not is_installed:
        raise UsageError(f"{what} {extras.is_wanted('plot')}")
    # Raises where nothing can be written.
    if not OutputFile(text, option="--plot").is_replaced:
        raise UsageError(f"{what} is not a regular file. Name a file, for instance {example}.")
    return Path(text)
