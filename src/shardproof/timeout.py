"""Check the timeout of a user: seconds that a rank waits for the others in one collective."""

import math
from typing import Any

from shardproof.checked_values import checked_real

# Seconds for the start, in which ranks import torch; the user's timeout does not apply to it.
START_TIMEOUT = 300.0

# A year. Longer timeouts overflow 64-bit nanoseconds or a timedelta.
LONGEST = 31_536_000.0


def checked_timeout(timeout: Any) -> float | None:
    """Return the timeout in seconds, or None for the default.

    Raises:
        UsageError: it is not a positive number, or more than a year.
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
