"""Check numbers, names and flags of users, from Python, the command line and the environment.

Every error shows the value as it was written, the rule, and what to do.
"""

import math
import operator
import re
from collections.abc import Callable
from numbers import Real
from typing import Any, cast

from shardproof.errors import ShardproofError, UsageError
from shardproof.wording import short_repr

LARGEST = 2**31 - 1  # limit of counts and sizes, far above the memory of any machine
LARGEST_SEED = 2**63 - 1
_DIGITS = re.compile(r"[+-]?[0-9]{1,1000}")  # Python itself refuses to read much longer ones


def whole_number(value: Any) -> int | None:
    """`value` as an int if it is an integer of any type (also numpy's) but no bool; else None."""
    if isinstance(value, bool):
        return None
    try:
        number = operator.index(value)
    except Exception:  # a TypeError, or any error of a user's class
        return None
    # A tensor of one bool also converts to an index.
    return None if "bool" in str(getattr(value, "dtype", "")) else int(number)


def real_number(value: Any) -> float | None:
    """`value` as a float if it is a real number of any type but no bool; else None."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer or fraction that is too large for a float
        return -math.inf if cast(Any, value) < 0 else math.inf


def read_whole(text: str) -> int | None:
    """The number in a text of ASCII digits, without surrounding blanks; None for other text.

    `int` would also accept digits of other scripts, and underscores.

    >>> read_whole(" 12 "), read_whole("-3"), read_whole("1_000"), read_whole("0x10")
    (12, -3, None, None)
    """
    text = text.strip(" \t\r\n")
    return int(text) if _DIGITS.fullmatch(text) else None


def checked_whole(
    value: Any,
    name: str,
    *,
    least: int = 1,
    most: int = LARGEST,
    error: Callable[[str], ShardproofError] = UsageError,
) -> int:
    """Convert a whole number of a user to an int.

    Args:
        value: the argument.
        name: its name ("steps").
        least: the smallest valid value.
        most: the largest valid value.
        error: the class of the error.

    Raises:
        ShardproofError: `error`, if it is not a whole number, too small or too large.
    """
    number = whole_number(value)
    if number is None or (least == 1 and number < 1):
        kind = "a positive whole number" if least == 1 else "a whole number"
        raise error(f"{name}={short_repr(value)} is not {kind}. Use {least} or more.")
    if not least <= number <= most:
        raise error(f"{name}={short_repr(number)} is out of range. Use {least} to {most}.")
    return number


def checked_real(value: Any, name: str, *, rule: str, holds: Callable[[float], bool]) -> float:
    """Convert a real number of a user to a float.

    Args:
        value: the argument.
        name: its name ("max_norm").
        rule: the rule, which continues "is not" in the error.
        holds: function that says whether a number obeys the rule; False for NaN.

    Raises:
        UsageError: it is not a real number, or the rule does not hold.
    """
    number = real_number(value)
    if number is None or not holds(number):
        raise UsageError(f"{name}={short_repr(value)} is not {rule}.")
    return number


def checked_flag(value: Any, name: str) -> bool:
    """Return a flag of a user, which must be True or False.

    Raises:
        UsageError: it is not a bool.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name}={short_repr(value)} is neither True nor False. Use one of them.")
    return value


def checked_name(value: Any, name: str) -> str:
    """Return a name of a user.

    Raises:
        UsageError: it is no text, or empty.
    """
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name}={short_repr(value)} is not a name. Give text that is not empty.")
    return value
