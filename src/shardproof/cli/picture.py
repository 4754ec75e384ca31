"""`--plot FILE`: whether a picture can be drawn and written is found out before the work."""

from pathlib import Path

from shardproof import extras
from shardproof.cli.json_file import JsonFile
from shardproof.cli.output import listed
from shardproof.errors import UsageError
from shardproof.wording import shown, written

EXTRA = "plot"  # brings matplotlib
SUFFIXES = (".png", ".svg", ".pdf")


def checked_picture(given: str, *, is_installed: bool, example: str) -> Path:
    """Where the picture goes.

    Args:
        given: as the user wrote it.
        is_installed: whether there is something to draw with.
        example: a file name for messages.

    Raises:
        UsageError: it could not be drawn or written.
    """
    said = f"--plot {written(given)}"
    if Path(given).suffix not in SUFFIXES:
        raise UsageError(
            f"--plot {shown(given)} does not end in {listed(SUFFIXES)}, which say how to draw. "
            f"Name a file, for instance --plot {example}."
        )
    if not is_installed:
        raise UsageError(f"{said} {extras.is_wanted(EXTRA)}")
    # Raises where nothing can be written.
    if not JsonFile(given, option="--plot").is_replaced:
        raise UsageError(f"{said} is not a regular file. Name a file, for instance {example}.")
    return Path(given)
