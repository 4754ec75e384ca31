"""How long a rank waits for the others in one collective, as users give it."""

import math
from typing import Any

from shardproof.quantities import checked_real

# Importing torch on a busy machine takes its time, and has nothing to do with the user's timeout.
START_TIMEOUT = 300.0

# A year. What waits counts in nanoseconds of 64 bits, or in days of a timedelta, and overflows.
LONGEST = 31_536_000.0


def checked_timeout(timeout: Any) -> float | None:
    """Seconds, or None where the choice is left to others.

    Raises:
        UsageError: it is no positive number, or longer than a year.
    """
    if timeout is None:
        return None
    rule = "a positive number of seconds. Use for instance 600"
    checked_real(timeout, "timeout", rule=rule, holds=lambda seconds: 0 < seconds < math.inf)
    return checked_real(
        timeout,
        "timeout",
        rule=f"a time that anybody waits. Use at most {LONGEST:,.0f} seconds, which is a year",
        holds=lambda seconds: seconds <= LONGEST,
    )
