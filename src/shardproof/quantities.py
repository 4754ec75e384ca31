"""Numbers and names as users give them, in Python, on the command line and in the environment.

Every check names the value as it was written, the rule and the way out.
"""

import math
import operator
import re
from collections.abc import Callable
from numbers import Real
from typing import Any, cast

from shardproof.errors import ShardproofError, UsageError
from shardproof.wording import shown

LARGEST = 2**31 - 1  # of counts and sizes; far above what a machine can hold
LARGEST_SEED = 2**63 - 1
_DIGITS = re.compile(r"[+-]?[0-9]{1,1000}")  # Python itself refuses to read much longer ones


def whole_number(value: Any) -> int | None:
    """`value` as an int if it is one in any spelling (numpy's too), and no bool; else None."""
    if isinstance(value, bool):
        return None
    try:
        number = operator.index(value)
    except Exception:  # a TypeError, or whatever a class of somebody else raises there
        return None
    # A tensor of one bool says that it is an index, too.
    return None if "bool" in str(getattr(value, "dtype", "")) else int(number)


def real_number(value: Any) -> float | None:
    """`value` as a float if it is a real number in any spelling, and no bool; else None."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number or a fraction that no float can hold
        return -math.inf if cast(Any, value) < 0 else math.inf


def read_whole(text: str) -> int | None:
    """The number that text spells in ASCII digits, blanks around it left out; else None.

    `int` takes more: digits of other scripts, and underscores.

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
    """A whole number as a user gave it, as an int.

    Args:
        value: what was given.
        name: what it was given as ("steps").
        least: the smallest that makes sense.
        most: the largest.
        error: what is raised.

    Raises:
        ShardproofError: `error`, if it is not a whole number, too small or too large.
    """
    number = whole_number(value)
    if number is None or (least == 1 and number < 1):
        kind = "a positive whole number" if least == 1 else "a whole number"
        raise error(f"{name}={shown(value)} is not {kind}. Use {least} or more.")
    if not least <= number <= most:
        raise error(f"{name}={shown(number)} is out of range. Use {least} to {most}.")
    return number


def checked_real(value: Any, name: str, *, rule: str, holds: Callable[[float], bool]) -> float:
    """A real number as a user gave it, as a float.

    Args:
        value: what was given.
        name: what it was given as ("max_norm").
        rule: continues "is not", and says what is wanted.
        holds: of the number, False for NaN too.

    Raises:
        UsageError: it is no real number, or the rule does not hold.
    """
    number = real_number(value)
    if number is None or not holds(number):
        raise UsageError(f"{name}={shown(value)} is not {rule}.")
    return number


def checked_flag(value: Any, name: str) -> bool:
    """True or False, and nothing that is only like it.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name}={shown(value)} is neither True nor False. Use one of them.")
    return value


def checked_name(value: Any, name: str) -> str:
    """A name as a user gave it.

    Raises:
        UsageError: it is no text, or empty.
    """
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name}={shown(value)} is not a name. Give text that is not empty.")
    return value
