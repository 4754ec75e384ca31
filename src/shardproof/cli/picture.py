"""`--plot FILE`: whether a picture can be drawn and written is found out before the work."""

from pathlib import Path

from shardproof import extras
from shardproof.cli.json_file import JsonFile
from shardproof.cli.output import listed
from shardproof.errors import UsageError

EXTRA = "plot"  # brings matplotlib
SUFFIXES = (".png", ".svg", ".pdf")


def checked_picture(written: str, *, is_installed: bool, example: str) -> Path:
    """Where the picture goes.

    Args:
        written: as the user wrote it.
        is_installed: whether there is something to draw with.
        example: a file name for messages.

    Raises:
        UsageError: it could not be drawn or written.
    """
    if Path(written).suffix not in SUFFIXES:
        raise UsageError(
            f"--plot {written!r} does not end in {listed(SUFFIXES)}, which say how to draw. "
            f"Name a file, for instance --plot {example}."
        )
    if not is_installed:
        raise UsageError(f"--plot {written} {extras.is_wanted(EXTRA)}")
    JsonFile(written, option="--plot")  # raises where nothing can be written
    return Path(written)
