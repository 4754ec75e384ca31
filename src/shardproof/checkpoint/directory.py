"""A directory that appears under its name only when it is whole.

A save writes into `.NAME.saving` beside the directory, and renames it at the end. The file `.lock`
in it is locked while the save runs; a process that is killed loses its lock, so that the next save
knows a leftover. A directory that is replaced is called `.NAME.previous` between two renames;
`recover` gives it its name back.
"""

import fcntl
import os
import shutil
from pathlib import Path

from shardproof import files
from shardproof.errors import UsageError
from shardproof.wording import short_text

STATE = "shardproof.json"
MANIFEST = "shardproof.manifest.json"
_LOCK = ".lock"  # flock of a file works on network file systems too, of a directory not
_OTHER = "Name a directory that does not exist, is empty, or has a checkpoint of shardproof."


class SavedDirectory:
    """A directory that is being saved; used by one rank.

    Args:
        directory: its name when it is whole.

    Attributes:
        work: the directory that has the files until then.

    Raises:
        UsageError: `directory` exists and is no checkpoint, or another process saves there.
        OSError: it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.work = work_of(directory)
        recover(directory)
        check_replaceable(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        self._lock: int | None = _locked(self.work / _LOCK, directory)
        for leftover in self.work.iterdir():
            if leftover.name != _LOCK:
                _remove(leftover)

    def finish(self) -> None:
        """Give the directory its name; what had the name before is removed.

        Raises:
            OSError: it cannot be renamed.
        """
        if self._lock is None:
            return
        sync(self.work)
        previous = previous_of(self.directory)
        replaces = self.directory.is_dir()
        if replaces:
            os.rename(self.directory, previous)
        os.rename(self.work, self.directory)
        sync(self.directory.parent)
        (self.directory / _LOCK).unlink()
        os.close(self._lock)
        self._lock = None
        if replaces:
            _remove(previous)

    def abandon(self) -> None:
        """Remove what was written; the directory of before stays, or gets its name back."""
        if self._lock is None:
            return  # it was finished
        if self.work.is_dir():
            _remove(self.work)
        recover(self.directory)
        os.close(self._lock)
        self._lock = None


def _locked(path: Path, directory: Path) -> int:
    """The descriptor of a locked file.

    Raises:
        UsageError: another process has it locked.
        OSError: it cannot be locked.
    """
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = path.exists() and os.path.samestat(path.stat(), os.fstat(lock))
    except BlockingIOError:
        is_there = False
    if is_there:
        return lock
    os.close(lock)
    raise UsageError(
        f"another process saves into {short_text(str(directory))}: {path.parent.name} beside it is "
        "locked. Give each run a directory of its own."
    )


def work_of(directory: Path) -> Path:
    """Where a directory is while it is being saved."""
    return directory.parent / f".{directory.name}.saving"


def previous_of(directory: Path) -> Path:
    """What a directory is called while another one takes its place."""
    return directory.parent / f".{directory.name}.previous"


def recover(directory: Path) -> None:
    """Finish a replacement that was interrupted between its two renames, or after them.

    Raises:
        OSError: it cannot be renamed or removed.
    """
    previous = previous_of(directory)
    if not previous.is_dir():
        return
    if directory.exists():
        _remove(previous)
    else:
        os.rename(previous, directory)


def check_replaceable(directory: Path) -> None:
    """Raise unless a checkpoint may take the place of what has the name of `directory`.

    Raises:
        UsageError: it is no directory, or one with other things than a checkpoint.
    """
    what = short_text(str(directory))
    if not os.path.lexists(directory):
        return
    if directory.is_symlink() or not directory.is_dir():
        raise UsageError(f"{what} exists and is no directory. {_OTHER}")
    is_empty = next(directory.iterdir(), None) is None
    if not is_empty and not (directory / STATE).is_file():
        raise UsageError(
            f"{what} exists and is no checkpoint of shardproof: it has no {STATE}. Nothing in it "
            f"was changed. {_OTHER}"
        )


def checked_path(directory: object) -> Path:
    """The directory argument of a user, as an absolute path.

    Raises:
        UsageError: it is no path, or has no name ("/", "..").
    """
    path = files.path_of(directory, what="the directory", way_out="Name one.")
    path = Path(os.path.abspath(path))
    if not path.name:
        raise UsageError(f"the directory {short_text(str(path))} has no name. {_OTHER}")
    return path


def sync(path: Path) -> None:
    """Let the disk have a file or a directory.

    Raises:
        OSError: it cannot.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
