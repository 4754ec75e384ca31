"""The checkpoints of one training in one directory: their names, the latest, and how many stay."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardproof import files
from shardproof.checked_values import checked_whole
from shardproof.checkpoint.directory import (
    STATE,
    check_replaceable,
    checked_path,
    locked,
    remove_checkpoint,
    remove_leftovers,
    wait_for_name,
)
from shardproof.errors import UsageError
from shardproof.wording import short_text

_NAME = re.compile(r"step-(\d+)")
_RUN_LOCK = ".run.lock"
_LEFTOVER = re.compile(r"\.(step-\d+)\.(saving|previous|removing)")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of a step.

    >>> checkpoint_name(1200)
    'step-00001200'
    """
    return f"step-{step:08}"


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the most steps among `directory/step-00000100` and the like.

    A checkpoint has its name only when it is whole. So a save that was killed leaves none that
    could be found.

    Args:
        directory: where checkpoints were saved; it need not exist.

    Returns:
        Its absolute path; None if there is none.

    Raises:
        UsageError: `directory` is no path, is a file, or cannot be read.
    """
    steps = checkpoints_of(directory)
    return steps[max(steps)] if steps else None


def checkpoints_of(directory: str | os.PathLike[str]) -> dict[int, Path]:
    """Step -> checkpoint, of all checkpoints in a directory.

    Args:
        directory: as in `latest_checkpoint`.

    Raises:
        UsageError: as in `latest_checkpoint`.
    """
    path = _checked(directory)
    if not path.is_dir():
        return {}
    try:
        for each in list(path.iterdir()):
            interrupted = _LEFTOVER.fullmatch(each.name)
            if interrupted and interrupted[2] == "previous":
                wait_for_name(path / interrupted[1])
        names = ((each, _NAME.fullmatch(each.name)) for each in path.iterdir())
        return {int(name[1]): each for each, name in names if name and (each / STATE).is_file()}
    except OSError as error:
        raise UsageError(
            f"{short_text(str(path))} cannot be read: {files.why(error)}. Name another directory."
        ) from None


def _checked(directory: str | os.PathLike[str]) -> Path:
    """The path of a directory that may not exist.

    Raises:
        UsageError: it is something else.
    """
    path = checked_path(directory)
    if os.path.lexists(path) and not path.is_dir():
        raise UsageError(f"{short_text(str(path))} is no directory. Name one for checkpoints.")
    return path


@contextmanager
def run_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which no other run can save its checkpoints into a directory.

    The directory is made if it does not exist.

    Args:
        directory: as in `latest_checkpoint`.

    Raises:
        UsageError: another run saves there, or nothing can be written there.
    """
    path = _checked(directory)
    what = short_text(str(path))
    try:
        path.mkdir(parents=True, exist_ok=True)
        for each in path.iterdir():
            if _NAME.fullmatch(each.name) and not (each / STATE).is_file():
                check_replaceable(each)  # before the training, and not when it is to be saved
        lock = locked(path / _RUN_LOCK)
    except OSError as error:
        raise UsageError(
            f"nothing can be saved into {what}: {files.why(error)}. Name another directory."
        ) from None
    if lock is None:
        raise UsageError(
            f"another run saves into {what}: {_RUN_LOCK} there is locked. Give each run a "
            "directory of its own."
        )
    try:
        yield
    finally:
        (path / _RUN_LOCK).unlink(missing_ok=True)
        os.close(lock)


def remove_older(directory: str | os.PathLike[str], keep: int | None = None) -> None:
    """Remove leftovers of interrupted saves, and all checkpoints but those with the most steps.

    One rank calls it.

    Args:
        directory: as in `latest_checkpoint`.
        keep: how many stay; None: all.

    Raises:
        UsageError: `keep` is no positive number, or a checkpoint has foreign files.
        OSError: something cannot be removed.
    """
    path = checked_path(directory)
    checkpoints = checkpoints_of(path)
    if keep is not None:
        for step in sorted(checkpoints)[: -checked_whole(keep, "keep")]:
            remove_checkpoint(checkpoints.pop(step))
    leftovers = filter(None, (_LEFTOVER.fullmatch(each.name) for each in path.iterdir()))
    names = {str(leftover[1]) for leftover in leftovers}
    for name in sorted(names | {each.name for each in checkpoints.values()}):
        remove_leftovers(path / name)
