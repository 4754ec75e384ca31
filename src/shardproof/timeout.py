"""How long a rank waits for the others in one collective, as users give it."""

import math
from typing import Any

from shardproof.errors import UsageError

# Importing torch on a busy machine takes its time, and has nothing to do with the user's timeout.
START_TIMEOUT = 300.0


def checked_timeout(timeout: Any) -> float | None:
    """Seconds, or None where the choice is left to others.

    Raises:
        UsageError: it is no positive finite number.
    """
    if timeout is None:
        return None
    if (
        not isinstance(timeout, int | float)
        or isinstance(timeout, bool)
        or not 0 < timeout < math.inf
    ):
        raise UsageError(f"timeout={timeout!r} is not a positive number of seconds.")
    return float(timeout)
