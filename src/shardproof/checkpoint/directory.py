"""A directory that appears under its name only when it is whole.

A save writes into `.NAME.saving` beside the directory, and renames it at the end. The file `.lock`
in it is locked while the save runs; a process that is killed loses its lock, so that the next save
knows a leftover. A directory that is replaced is called `.NAME.previous` between two renames, and
`.NAME.removing` while it is removed, with `shardproof.json` last.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardproof import files
from shardproof.errors import UsageError
from shardproof.wording import few, short_text

STATE = "shardproof.json"
MANIFEST = "shardproof.manifest.json"
RANK_MARK = ".rank-"  # begins the names of what ranks tell each other while they save
LARGEST_JSON = 1 << 30  # bytes of either
_LOCK = ".lock"  # flock of a file works on network file systems too, of a directory not
_OTHER = "Name a directory that does not exist, is empty, or has a checkpoint of shardproof."
_PATIENCE = 10.0  # seconds that a load waits for the end of a replacement


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
        check_replaceable(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        _check_leftover(self.work, _LOCK)
        self.work.mkdir(exist_ok=True)
        self._lock: int | None = locked(self.work / _LOCK)
        if self._lock is None:
            raise UsageError(
                f"another save into {short_text(str(directory))} goes on: {self.work.name} beside "
                "it is locked. Give each run a directory of its own."
            )
        try:
            _recover(directory)
            check_replaceable(directory)
            for leftover in self.work.iterdir():
                if leftover.name != _LOCK:
                    _remove(leftover)
        except BaseException:
            self._unlock()
            raise

    def finish(self) -> None:
        """Give the directory its name; what had the name before is removed.

        Raises:
            UsageError: something else has got the name meanwhile.
            OSError: it cannot be renamed.
        """
        sync(self.work)
        check_replaceable(self.directory)
        replaces = self.directory.is_dir()
        if replaces:
            os.rename(self.directory, previous_of(self.directory))
        os.rename(self.work, self.directory)
        sync(self.directory.parent)
        (self.directory / _LOCK).unlink()
        self._unlock()
        if replaces:
            _remove_previous(self.directory)

    def abandon(self) -> None:
        """Remove what was written; the directory of before stays, or gets its name back."""
        if self._lock is None:
            return  # it was finished
        try:
            # The error that led here is the one to raise; the next save cleans up.
            with contextlib.suppress(OSError):
                if self.work.is_dir():
                    shutil.rmtree(self.work)
                _recover(self.directory)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def work_of(directory: Path) -> Path:
    """Where a directory is while it is being saved."""
    return directory.parent / f".{directory.name}.saving"


def previous_of(directory: Path) -> Path:
    """What a directory is called while another one takes its place."""
    return directory.parent / f".{directory.name}.previous"


def _removing(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.removing"


def locked(path: Path) -> int | None:
    """The descriptor of a file that is locked now; None if another process has it locked.

    Raises:
        OSError: it cannot be locked.
    """
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    is_mine = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_mine = path.exists() and os.path.samestat(path.stat(), os.fstat(lock))
    except BlockingIOError:
        return None
    finally:
        if not is_mine:
            os.close(lock)
    return lock if is_mine else None


def _recover(directory: Path) -> None:
    """Finish a replacement that was interrupted; called while the lock is held.

    Raises:
        UsageError: a directory of that name is not of shardproof.
        OSError: it cannot be renamed or removed.
    """
    previous = previous_of(directory)
    if os.path.lexists(previous):
        check_replaceable(previous)
        if not os.path.lexists(directory):
            os.rename(previous, directory)
    _remove_previous(directory)


def _remove_previous(directory: Path) -> None:
    """Remove the checkpoint that was replaced, and leftovers of an earlier removal."""
    for path in (_removing(directory), previous_of(directory)):
        if os.path.lexists(path):
            _check_leftover(path, STATE)
            if path != _removing(directory):
                path = path.rename(_removing(directory))
            for each in path.iterdir():
                if each.name != STATE:
                    _remove(each)
            _remove(path)


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint; nothing has its name any more, even if that is interrupted.

    Raises:
        UsageError: it has files that its manifest does not list; nothing is removed then.
        OSError: it cannot be removed.
    """
    check_replaceable(directory)
    if os.path.lexists(directory):
        os.rename(directory, _removing(directory))
    _remove_previous(directory)


def remove_leftovers(directory: Path) -> None:
    """Remove what an interrupted save or removal of a name left, unless another process saves.

    A save that is killed after the rename leaves its lock in the directory.

    Raises:
        UsageError: a directory of that name is not of shardproof.
        OSError: it cannot be removed.
    """
    work = work_of(directory)
    _check_leftover(work, _LOCK)
    place = work if work.is_dir() else directory
    lock = locked(place / _LOCK) if os.path.lexists(place / _LOCK) else -1
    if lock is None:
        return
    try:
        _recover(directory)
        if work.is_dir():
            shutil.rmtree(work)
        (directory / _LOCK).unlink(missing_ok=True)
    finally:
        if lock >= 0:
            os.close(lock)


def wait_for_name(directory: Path) -> None:
    """Wait while a directory is being replaced; give it its name back if that was interrupted.

    Raises:
        UsageError: the replacement takes too long.
        OSError: it cannot be renamed.
    """
    previous = previous_of(directory)
    end = time.monotonic() + _PATIENCE
    while not os.path.lexists(directory) and previous.is_dir():
        work = work_of(directory)
        lock = locked(work / _LOCK) if work.is_dir() else -1
        if lock is not None:
            try:
                if not os.path.lexists(directory) and previous.is_dir():
                    check_replaceable(previous)
                    os.rename(previous, directory)
            finally:
                if lock >= 0:
                    os.close(lock)
            return
        if time.monotonic() > end:
            raise UsageError(
                f"{short_text(str(directory))} is being replaced by another process. Load it again "
                "when that has ended."
            )
        time.sleep(0.01)


def check_replaceable(directory: Path) -> None:
    """Raise unless a checkpoint may take the place of what has the name of `directory`.

    Raises:
        UsageError: it is no directory, or has something that is not of a checkpoint.
    """
    what = short_text(str(directory))
    if not os.path.lexists(directory):
        return
    if directory.is_symlink() or not directory.is_dir():
        raise UsageError(f"{what} exists and is no directory. {_OTHER}")
    names = {path.relative_to(directory).as_posix() for path in _files(directory)}
    if not names and next(directory.iterdir(), None) is None:
        return
    if STATE not in names:
        raise UsageError(
            f"{what} exists and is no checkpoint of shardproof: it has no {STATE}. Nothing in it "
            f"was changed. {_OTHER}"
        )
    others = sorted(names - _listed(directory) - {STATE, MANIFEST, _LOCK})
    if others:
        raise UsageError(
            f"{what} has files that its {MANIFEST} does not list: {few(others, most=3)}. Saving "
            "would remove them, so nothing was changed. Move them out."
        )


def _listed(directory: Path) -> set[str]:
    """The files that the manifest of a directory lists; none if it has no such list."""
    path = directory / MANIFEST
    if not path.is_file():
        return set()
    way_out = "Remove the directory yourself."
    what = short_text(str(path))
    content: Any = files.read_json(path, what=what, way_out=way_out, largest=LARGEST_JSON)
    listed = content.get("files") if isinstance(content, dict) else None
    return set(listed) if isinstance(listed, dict) else set()


def _files(directory: Path) -> Iterator[Path]:
    """Everything in a directory that is no directory itself, and empty directories."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is not None:
            yield from _files(path)
        else:
            yield path


def files_of(directory: Path) -> list[str]:
    """Names of the files of a checkpoint without the manifest, from the directory, in order."""
    paths = (path.relative_to(directory).as_posix() for path in _files(directory))
    return sorted(
        name for name in paths if name not in (MANIFEST, _LOCK) and not name.startswith(RANK_MARK)
    )


def _check_leftover(path: Path, mark: str) -> None:
    """Raise unless what has the name of a leftover is one: empty, or with a certain file in it."""
    if not os.path.lexists(path):
        return
    is_one = path.is_dir() and not path.is_symlink()
    if not is_one or ((path / mark) not in (entries := list(path.iterdir())) and entries):
        raise UsageError(
            f"{short_text(str(path))} is in the way, and shardproof did not make it. Move it."
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
