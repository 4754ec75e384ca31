"""What users write on the command line, made into values or into one clear error.

Values are checked here and not by click, so that every message names the option and the value as
written, the rule and the way out.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from shardproof.errors import UsageError
from shardproof.leaves import check_degree

HELP_OPTIONS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
LARGEST_SEED = 2**63 - 1
NUMBER = r"[+-]?[0-9]{1,1000}"  # Python itself refuses to read much longer ones

Name = TypeVar("Name", bound=str)


def whole_number(text: str, *, option: str, example: int) -> int:
    """The number that `text` is.

    Raises:
        UsageError: it is not a whole number.
    """
    if not re.fullmatch(NUMBER, text.strip()):
        raise UsageError(
            f"{option} {text!r} is not a whole number. Use for instance {option} {example}."
        )
    return int(text)


def positive(text: str, *, option: str, example: int) -> int:
    """The number that `text` is, 1 or more.

    Raises:
        UsageError: it is not a whole number, or not positive.
    """
    number = whole_number(text, option=option, example=example)
    if number < 1:
        raise UsageError(
            f"{option} {number} is not a positive number. "
            f"Use 1 or more, for instance {option} {example}."
        )
    return number


def seed(text: str) -> int:
    """The seed that `text` is.

    Raises:
        UsageError: it is not a whole number that fits a generator.
    """
    number = whole_number(text, option="--seed", example=12345)
    if not 0 <= number <= LARGEST_SEED:
        raise UsageError(
            f"--seed {number} is out of range. Use a number from 0 to {LARGEST_SEED}, "
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
                f"--degrees {text}: degree {degree} is there twice. Name each degree once."
            )
        check_degree(degree, leaves)
        found.append(degree)
    return tuple(sorted(found))


def _degree(part: str, text: str) -> int:
    if not re.fullmatch(NUMBER, part):
        written = repr(part) if part else "an empty place"
        raise UsageError(
            f"--degrees {text}: {written} is not a degree. Use whole numbers, 1 or more, "
            f"separated by commas, for instance --degrees 1,2,3,4."
        )
    degree = int(part)
    if degree < 1:
        raise UsageError(
            f"--degrees {text}: degree {degree} is not a positive number. A degree is a number of "
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
    near = difflib.get_close_matches(text, known, n=1)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise UsageError(f"{option} {text!r} is unknown. {guess}Use one of: {', '.join(known)}.")
