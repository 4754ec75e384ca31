"""How everything that people read is written: plain ASCII, calm, at any width."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import Box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from shardproof.plans.plan_text import size as size
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

GOOD, BAD, QUIET = "green", "bold red", "dim"
NARROWEST = 20  # columns
WIDE = 100  # columns from which a table need not save room


class PlainConsole(Console):
    """A console that prints text as it is given and leaves a broken pipe to the caller."""

    def __init__(self, **options: Any) -> None:
        # Names of tensors and extras have brackets, which are no markup.
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        # COLUMNS=0, which some shells and CI systems set, would leave no room for any text.
        self.width = max(self.width, NARROWEST)

    def show(self, what: RenderableType) -> None:
        """Print without the blanks with which rich fills every line."""
        with self.capture() as captured:
            self.print(what)
        self.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())

    def on_broken_pipe(self) -> None:
        """Let `main` decide about the exit code; rich would exit with 1."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> PlainConsole:
    """A console on standard output or standard error as they are now."""
    return PlainConsole(stderr=stderr)


def table(*columns: str, width: int, right: Iterable[str] = ()) -> Table:
    """An empty table with a rule under its head; columns in `right` are aligned to the right."""
    made = Table(
        box=RULE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if width >= WIDE else 0, 0, 0),
        header_style="bold",
    )
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", overflow="fold", vertical="top"
        )
    return made


def yes_no(answer: bool) -> Text:
    """`yes`, or `NO` that nobody overlooks."""
    return Text("yes", GOOD) if answer else Text("NO", BAD)


def seconds(duration: float) -> str:
    """A duration with as many digits as tell something.

    >>> seconds(0.034), seconds(71.26)
    ('0.03', '71.3')
    """
    return f"{duration:.2f}" if duration < 10 else f"{duration:.1f}"


def shape(sizes: Iterable[int]) -> str:
    """A shape as one word; a scalar is a word too.

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
