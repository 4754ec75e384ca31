"""What users write on the command line, made into values or into one clear error.

Values are checked here and not by click, so that every message names the option and the value as
written, the rule and the way out.
"""

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

import click

from shardproof.errors import UsageError
from shardproof.leaves import DEFAULT_LEAVES, check_degree
from shardproof.prover import DEFAULT_SEED
from shardproof.quantities import LARGEST, LARGEST_SEED, read_whole
from shardproof.wording import VALUE, shown, written

HELP_OPTIONS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
Name = TypeVar("Name", bound=str)

leaves_option = click.option(
    "--leaves",
    metavar="N",
    default=str(DEFAULT_LEAVES),
    show_default=True,
    help="Into how many parts sums are cut: the highest possible degree.",
)
seed_option = click.option(
    "--seed",
    metavar="N",
    default=str(DEFAULT_SEED),
    show_default=True,
    help="Of all random numbers.",
)


def parse_whole(text: str, *, option: str, example: int) -> int:
    """The number that `text` is.

    Raises:
        UsageError: it is not a whole number.
    """
    number = read_whole(text)
    if number is None:
        raise UsageError(
            f"{option} {shown(text)} is not a whole number. Use for instance {option} {example}."
        )
    return number


def positive(text: str, *, option: str, example: int, most: int = LARGEST) -> int:
    """The number that `text` is, 1 or more.

    Raises:
        UsageError: it is not a whole number, not positive, or above `most`.
    """
    number = parse_whole(text, option=option, example=example)
    if number < 1:
        raise UsageError(
            f"{option} {shown(number)} is not a positive number. "
            f"Use 1 or more, for instance {option} {example}."
        )
    if number > most:
        raise UsageError(
            f"{option} {shown(number)} is out of range. "
            f"Use 1 to {most}, for instance {option} {example}."
        )
    return number


def seed(text: str) -> int:
    """The seed that `text` is.

    Raises:
        UsageError: it is not a whole number that fits a generator.
    """
    number = parse_whole(text, option="--seed", example=12345)
    if not 0 <= number <= LARGEST_SEED:
        raise UsageError(
            f"--seed {shown(number)} is out of range. Use a number from 0 to {LARGEST_SEED}, "
            f"for instance --seed 12345."
        )
    return number


def degrees(text: str, *, leaves: int) -> tuple[int, ...]:
    """The degrees of a comma list, in rising order.

    Raises:
        UsageError: the list is empty, has something else than positive numbers, or has one twice.
        DegreeError: a degree exceeds the leaves.
    """
    if not text.strip():
        raise UsageError(
            "--degrees is empty, and at least one degree is needed. "
            "Use for instance --degrees 1,2,3,4."
        )
    found: list[int] = []
    for part in text.split(","):
        degree = _degree(part.strip(), text)
        if degree in found:
            raise UsageError(
                f"--degrees {written(text, most=VALUE)}: degree {degree} is there twice. Name each "
                "degree once."
            )
        check_degree(degree, leaves)
        found.append(degree)
    return tuple(sorted(found))


def _degree(part: str, text: str) -> int:
    degree, start = read_whole(part), f"--degrees {written(text, most=VALUE)}"
    if degree is None:
        said = shown(part) if part else "an empty place"
        raise UsageError(
            f"{start}: {said} is not a degree. Use whole numbers, 1 or more, "
            f"separated by commas, for instance --degrees 1,2,3,4."
        )
    if degree < 1:
        raise UsageError(
            f"{start}: degree {shown(degree)} is not a positive number. A degree is a number of "
            f"ranks; use 1 or more, for instance --degrees 1,2,3,4."
        )
    return degree


def one_of(text: str, known: Sequence[Name], *, option: str) -> Name:
    """The known name that `text` is.

    Raises:
        UsageError: it is none; names the nearest.
    """
    for name in known:
        if name == text:
            return name
    near = difflib.get_close_matches(text[:VALUE], known, n=1)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise UsageError(f"{option} {shown(text)} is unknown. {guess}Use one of: {', '.join(known)}.")
