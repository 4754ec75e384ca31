"""The types of the options: click calls them to make a value of what a user wrote, or one error.

Each error names the option and the value as it was written, the rule, and what to write instead.
"""

import difflib
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from shardproof import torchrun
from shardproof.checked_values import LARGEST, LARGEST_SEED, read_whole
from shardproof.cli.output_file import OutputFile
from shardproof.errors import UsageError
from shardproof.leaves import DEFAULT_LEAVES
from shardproof.prover import DEFAULT_SEED
from shardproof.timeout import LONGEST
from shardproof.wording import VALUE, short_repr, short_text

Command = TypeVar("Command", bound=Callable[..., Any])
if TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:  # older versions of click have no such parameter
    _Type = click.ParamType

HELP_OPTIONS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def parse_whole(text: str, *, option: str, example: int) -> int:
    """The number that `text` is.

    Raises:
        UsageError: it is not a whole number.
    """
    number = read_whole(text)
    if number is None:
        raise UsageError(
            f"{option} {short_repr(text)} is not a whole number. Use for instance {option} "
            f"{example}."
        )
    return number


def positive(text: str, *, option: str, example: int) -> int:
    """The number that `text` is, 1 or more.

    Raises:
        UsageError: it is not a whole number, not positive, or too large.
    """
    number = parse_whole(text, option=option, example=example)
    if number < 1:
        raise UsageError(
            f"{option} {short_repr(number)} is not a positive number. "
            f"Use 1 or more, for instance {option} {example}."
        )
    if number > LARGEST:
        raise UsageError(
            f"{option} {short_repr(number)} is out of range. "
            f"Use 1 to {LARGEST}, for instance {option} {example}."
        )
    return number


class PositiveNumber(_Type):
    """A whole number, 1 or more.

    Args:
        example: for messages.
    """

    name = "positive number"

    def __init__(self, example: int) -> None:
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> int:
        """The number; a default is a number already."""
        return positive(str(value), option=_name(param), example=self._example)


class WholeNumber(_Type):
    """A whole number, 0 or more.

    Args:
        example: for messages.
        most: the largest valid number.
    """

    name = "whole number"

    def __init__(self, example: int, *, most: int = LARGEST) -> None:
        self._example, self._most = example, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> int:
        """The number; a default is a number already."""
        option = _name(param)
        number = parse_whole(str(value), option=option, example=self._example)
        if not 0 <= number <= self._most:
            raise UsageError(
                f"{option} {short_repr(number)} is out of range. Use a number from 0 to "
                f"{self._most}, for instance {option} {self._example}."
            )
        return number


class Number(_Type):
    """A finite number above 0.

    Args:
        example: for messages.
        may_be_zero: 0 is valid too.
    """

    name = "number"

    def __init__(self, example: float, *, may_be_zero: bool = False) -> None:
        self._example, self._may_be_zero = example, may_be_zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> float:
        """The number; a default is a number already."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        is_valid = number > 0 or (self._may_be_zero and number == 0)
        if not (is_valid and math.isfinite(number)):
            rule = "of 0 or more" if self._may_be_zero else "above 0"
            raise UsageError(
                f"{_name(param)} {short_repr(value)} is not a number {rule}. Use for instance "
                f"{_name(param)} {self._example}."
            )
        return number


class Seconds(Number):
    """A time that a rank waits, of at most a year.

    Args:
        example: for messages.
    """

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> float:
        """The seconds; a default is a number already."""
        seconds = super().convert(value, param, ctx)
        if seconds > LONGEST:
            raise UsageError(
                f"{_name(param)} {short_repr(value)} is longer than a year. Use at most "
                f"{LONGEST:.0f} seconds, for instance {_name(param)} {self._example}."
            )
        return seconds


class Degrees(_Type):
    """Different positive numbers, separated by commas; the value has them in rising order."""

    name = "degrees"

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> tuple[int, ...]:
        """The degrees."""
        if not value.strip():
            raise UsageError(
                "--degrees is empty, and at least one degree is needed. "
                "Use for instance --degrees 1,2,3,4."
            )
        degrees: list[int] = []
        for part in value.split(","):
            degree = _degree(part.strip(), value)
            if degree in degrees:
                raise UsageError(
                    f"--degrees {short_text(value, most=VALUE)}: degree {degree} is there twice. "
                    "Name each degree once."
                )
            degrees.append(degree)
        return tuple(sorted(degrees))


def _degree(part: str, text: str) -> int:
    degree, start = read_whole(part), f"--degrees {short_text(text, most=VALUE)}"
    if degree is None:
        named = short_repr(part) if part else "an empty place"
        raise UsageError(
            f"{start}: {named} is not a degree. Use whole numbers, 1 or more, "
            f"separated by commas, for instance --degrees 1,2,3,4."
        )
    if degree < 1:
        raise UsageError(
            f"{start}: degree {short_repr(degree)} is not a positive number. A degree is a number "
            "of ranks; use 1 or more, for instance --degrees 1,2,3,4."
        )
    return degree


class Name(_Type):
    """One of some known names.

    Args:
        known: the names.
    """

    name = "name"

    def __init__(self, choices: Sequence[str]) -> None:
        self._choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> str:
        """The name. The error for an unknown name suggests the nearest."""
        if value in self._choices:
            return str(value)
        near = difflib.get_close_matches(value[:VALUE], self._choices, n=1)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{_name(param)} {short_repr(value)} is unknown. {guess}"
            f"Use one of: {', '.join(self._choices)}."
        )


class OutputPath(_Type):
    """A file to write, tried before any work; None on ranks of torchrun that write nothing."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> OutputFile | None:
        """The file."""
        if torchrun.is_other_rank(os.environ):
            return None
        return OutputFile(value, option=_name(param))


def _name(param: click.Parameter | None) -> str:
    """How an option is written."""
    return param.opts[0] if param is not None else "the option"


def is_written(option: str) -> bool:
    """Whether the user wrote an option of the command that runs.

    Args:
        option: the name of its argument ("batch").
    """
    source = click.get_current_context().get_parameter_source(option)
    return source is not ParameterSource.DEFAULT


def choice_option(name: str, choices: Sequence[str], **rest: Any) -> Callable[[Command], Command]:
    """A decorator for an option that takes one of some names."""
    return click.option(name, type=Name(choices), metavar="|".join(choices), **rest)


def number_option(
    name: str, *, example: int, metavar: str = "N", **rest: Any
) -> Callable[[Command], Command]:
    """A decorator for an option that takes a positive number."""
    return click.option(name, type=PositiveNumber(example), metavar=metavar, **rest)


def json_option(what: str) -> Callable[[Command], Command]:
    """A decorator for --json."""
    return click.option(
        "--json", "json_file", type=OutputPath(), metavar="FILE", help=f"Also write {what} to FILE."
    )


leaves_option = number_option(
    "--leaves",
    example=DEFAULT_LEAVES,
    default=DEFAULT_LEAVES,
    show_default=True,
    help="Into how many parts sums are cut: the highest possible degree.",
)
seed_option = click.option(
    "--seed",
    type=WholeNumber(DEFAULT_SEED, most=LARGEST_SEED),
    metavar="N",
    default=DEFAULT_SEED,
    show_default=True,
    help="Of all random numbers.",
)


def refuse_torchrun(command: str) -> None:
    """Raise if torchrun started this process: the command starts its own ranks."""
    if torchrun.read(os.environ) is not None:
        raise UsageError(
            f"shardproof {command} starts its own ranks and cannot run under torchrun. Run it "
            "without."
        )
