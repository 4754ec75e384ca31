"""What is happening now, on standard error: a line that moves in a terminal, else short lines."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress as Moving
from rich.progress import ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from shardproof.cli.output import PlainConsole, console
from shardproof.prover.proof import Progress

BAR_WIDTH = 24


@contextmanager
def progress(*, is_speaker: bool) -> Iterator[Progress | None]:
    """Something to call before each run, or None if somebody else speaks."""
    if not is_speaker:
        yield None
        return
    out = console(stderr=True)
    if not out.is_terminal:
        yield _Lines(out)
        return
    with Moving(
        SpinnerColumn("line"),
        _Bar(),
        TextColumn("{task.completed}/{task.total}  {task.description}", markup=False),
        console=out,
        transient=True,
        refresh_per_second=4,
    ) as shown:
        task = shown.add_task("", total=None, visible=False)

        def tell(done: int, total: int, text: str, /) -> None:
            shown.update(task, completed=done, total=total, description=text, visible=True)

        yield tell


class _Lines:
    """One short line for each run."""

    def __init__(self, out: PlainConsole) -> None:
        self._out = out

    def __call__(self, done: int, total: int, text: str, /) -> None:
        # Where standard error is full or closed, nobody can be told, and the work goes on.
        with contextlib.suppress(OSError):
            self._out.print(Text(f"[{done}/{total}] {text}"), soft_wrap=True)


class _Bar(ProgressColumn):
    """rich's own bar is not ASCII."""

    def render(self, task: Task) -> Text:
        share = task.completed / task.total if task.total else 0.0
        filled = round(BAR_WIDTH * share)
        return Text(f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]")
