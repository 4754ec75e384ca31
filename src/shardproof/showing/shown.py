"""What `sp.show` returns: the trace of one step, and its scenes as text, as a page and as data."""

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from shardproof import files
from shardproof.errors import UsageError
from shardproof.showing.page import page_of
from shardproof.showing.story import Story
from shardproof.showing.terminal import lines_of
from shardproof.trace.trace import Trace
from shardproof.wording import spelt_out, written

WIDTH = 80  # columns of `print`
_HEIGHT = 720  # pixels in a notebook
_WAY_OUT = "Name a file in a directory where you may create files, such as step.html."


@dataclass(frozen=True)
class Shown:
    """One training step, to look at.

    `print` writes it as text; a notebook shows the page.

    Attributes:
        trace: of all ranks, of the step alone.
        story: its scenes.
    """

    trace: Trace
    story: Story

    def page(self) -> str:
        """The page as text: HTML that needs no other file and no network."""
        return page_of(self.story)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file.

        Raises:
            UsageError: the file cannot be written.
        """
        where = checked_page(path)
        try:
            where.write_text(self.page(), encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"html={written(str(where))} cannot be written: {files.why(error)}. {_WAY_OUT}"
            ) from None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; "nan", "inf" and "1j" stand for what JSON has no numbers for."""
        found: dict[str, Any] = spelt_out(self.story.as_dict())
        return found

    def __str__(self) -> str:
        console = Console(width=WIDTH, no_color=True, force_terminal=False, highlight=False)
        with console.capture() as capture:
            for line in lines_of(self.story, values=False, width=WIDTH):
                console.print(line, soft_wrap=True)
        return capture.get().rstrip()

    def _repr_html_(self) -> str:
        """In a notebook, the page in a frame of its own."""
        return (
            f'<iframe title="{escape(self.story.title)}" srcdoc="{escape(self.page())}" '
            f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
        )


def checked_page(path: Any) -> Path:
    """Where a page goes, before any work is done for it.

    Raises:
        UsageError: it is no path, no regular file, or in a directory that is not there.
    """
    where = files.path_of(path, what="html", way_out=_WAY_OUT)
    try:
        is_other = where.exists() and not where.is_file()
    except OSError as error:
        raise UsageError(
            f"html={written(str(where))} cannot be written: {files.why(error)}. {_WAY_OUT}"
        ) from None
    if is_other:
        kind = "a directory" if where.is_dir() else "no regular file"
        raise UsageError(f"html={written(str(where))} is {kind}. {_WAY_OUT}")
    if not where.absolute().parent.is_dir():
        raise UsageError(
            f"html={written(str(where))}: there is no directory "
            f"{written(str(where.absolute().parent))}. {_WAY_OUT}"
        )
    return where
