"""Text, tables and progress in a terminal: plain ASCII, at any width."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import Box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import Progress as MovingLine
from rich.progress import ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from shardproof.plans.plan_text import size as size
from shardproof.prover.proof import Progress
from shardproof.wording import run_words

# rich's own boxes are not ASCII or draw more lines than a reader needs: one rule under the head.
RULE = Box(
    "    \n"
    "    \n"
    " -- \n"
    "    \n"
    "    \n"
    "    \n"
    "    \n"
    "    \n",
    ascii=True,
)  # fmt: skip

GOOD, BAD = "green", "bold red"
INDENT = 1  # of tables
NARROWEST = 20  # columns
BAR_WIDTH = 24
WIDE = 100  # columns from which a table need not save room


class ReaderLeftError(Exception):
    """Nobody reads standard output. It is no `OSError`, which click turns into exit code 1."""


class PlainConsole(Console):
    """A console that prints text as it is given and leaves a broken pipe to the caller."""

    def __init__(self, **options: Any) -> None:
        # Names of tensors and extras have brackets, which are no markup.
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        # COLUMNS=0, which some shells and CI systems set, would leave no room for any text.
        self.width = max(self.width, NARROWEST)

    def show(self, what: RenderableType) -> None:
        """Print without trailing blanks."""
        with self.capture() as captured:
            self.print(what)
        self.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())

    def heading(self, text: str) -> None:
        """Print the title of a part."""
        self.show(Text(f"== {text}", "bold"))

    def whole_line(self, text: str | Text, style: str = "") -> None:
        """Print one line, whole at any width, so that it can be searched for."""
        self.print(Text(text, style) if isinstance(text, str) else text, soft_wrap=True)

    def block(self, what: RenderableType) -> None:
        """Print a table or a text with an indent, then a blank line."""
        self.show(Padding(what, (0, 0, 0, INDENT)))
        self.print()

    def on_broken_pipe(self) -> None:
        """Raise, so that `main` chooses the exit code; rich would exit with 1."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> PlainConsole:
    """A console on the current standard output or standard error."""
    return PlainConsole(stderr=stderr)


def table(*columns: str, width: int, right: Iterable[str] = ()) -> Table:
    """An empty table with a rule under its head; columns in `right` are aligned to the right."""
    grid = Table(
        box=RULE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if width >= WIDE else 0, 0, 0),
        header_style="bold",
    )
    for column in columns:
        grid.add_column(
            column, justify="right" if column in right else "left", overflow="fold", vertical="top"
        )
    return grid


def grouped(
    subjects: Iterable[tuple[str, Iterable[tuple[str | Text, str | Text]]]],
    *,
    style: str = "",
    has_gaps: bool = False,
) -> Table:
    """Rows of two cells; the first row of each subject begins with its name.

    Args:
        subjects: names, and their rows.
        style: of the names.
        has_gaps: put an empty row after each subject.
    """
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=style, no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for subject, rows in subjects:
        for index, cells in enumerate(rows):
            grid.add_row(subject if index == 0 else "", *cells)
        if has_gaps:
            grid.add_row()
    return grid


def yes_no(answer: bool) -> Text:
    """A green `yes`, or a red `NO`."""
    return Text("yes", GOOD) if answer else Text("NO", BAD)


def seconds(duration: float) -> str:
    """Seconds, with two decimals below 10 and one above.

    >>> seconds(0.034), seconds(71.26)
    ('0.03', '71.3')
    """
    return f"{duration:.2f}" if duration < 10 else f"{duration:.1f}"


def shape(sizes: Iterable[int]) -> str:
    """A shape as one word.

    >>> shape([608, 1024]), shape([])
    ('608x1024', 'scalar')
    """
    return "x".join(map(str, sizes)) or "scalar"


def small(number: float | str | None) -> str:
    """A difference or an error in a few characters; the exponent keeps one digit if it can.

    >>> small(4.07e-08), small(0.0), small(None), small(2.5e+12)
    ('4.1e-8', '0', '-', '2.5e+12')
    """
    if number is None:
        return "-"
    if isinstance(number, str):  # "nan" and "inf", for which JSON has no number
        return number
    if number == 0:
        return "0"
    return f"{number:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def calls_text(kinds: Mapping[str, Mapping[str, int]]) -> str:
    """How often each collective was called, and the bytes of all its messages."""
    return listed(
        f"{counts['calls']} {kind} ({size(counts['message_bytes'])})"
        for kind, counts in kinds.items()
    )


def listed(items: Iterable[object]) -> str:
    """Items as prose.

    >>> listed([1, 2, 3]), listed(["one"])
    ('1, 2 and 3', 'one')
    """
    words = [str(item) for item in items]
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers, with runs of three or more abbreviated.

    >>> ranges([1, 2, 3, 4, 8]), ranges([1, 2])
    ('1-4, 8', '1, 2')
    """
    return ", ".join(run_words(numbers))


@contextmanager
def progress(*, is_speaker: bool) -> Iterator[Progress | None]:
    """A function to call before each run; None on ranks that print nothing."""
    if not is_speaker:
        yield None
        return
    out = console(stderr=True)
    if not out.is_terminal:
        yield ProgressLines(out)
        return
    with MovingLine(
        SpinnerColumn("line"),
        _Bar(),
        TextColumn("{task.completed}/{task.total}  {task.description}", markup=False),
        console=out,
        transient=True,
        refresh_per_second=4,
    ) as line:
        task = line.add_task("", total=None, visible=False)

        def tell(done: int, total: int, text: str, /) -> None:
            line.update(task, completed=done, total=total, description=text, visible=True)

        yield tell


class ProgressLines:
    """Prints one short line for each run."""

    def __init__(self, out: PlainConsole) -> None:
        self._out = out

    def __call__(self, done: int, total: int, text: str, /) -> None:
        """Print how far the work is."""
        # If standard error is full or closed, the work goes on without these lines.
        with contextlib.suppress(OSError):
            self._out.whole_line(f"[{done}/{total}] {text}")


class _Bar(ProgressColumn):
    """A bar in ASCII; rich's own is not."""

    def render(self, task: Task) -> Text:
        share = task.completed / task.total if task.total else 0.0
        filled = round(BAR_WIDTH * share)
        return Text(f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]")
