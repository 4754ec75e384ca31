"""The checkpoints of one training in one directory: their names, the latest, and how many stay."""

import os
import re
from pathlib import Path

from shardproof.checked_values import checked_whole
from shardproof.checkpoint.directory import (
    STATE,
    checked_path,
    remove_checkpoint,
    remove_leftovers,
)
from shardproof.errors import UsageError
from shardproof.wording import short_text

_NAME = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"\.(step-\d+)\.(saving|previous|removing)")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of a step.

    >>> checkpoint_name(1200)
    'step-00001200'
    """
    return f"step-{step:08}"


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the most steps among `directory/step-00000100` and the like.

    A checkpoint has its name only when it is whole, so one that a process was killed in is not
    found.

    Args:
        directory: where checkpoints were saved; it need not exist.

    Returns:
        Its absolute path; None if there is none.

    Raises:
        UsageError: `directory` is no path, or is a file.
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
    path = checked_path(directory)
    if not os.path.lexists(path):
        return {}
    if not path.is_dir():
        raise UsageError(f"{short_text(str(path))} is no directory. Name one for checkpoints.")
    found = {}
    for each in path.iterdir():
        name = _NAME.fullmatch(each.name)
        if name and (each / STATE).is_file():
            found[int(name[1])] = each
    return found


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
