"""Let SIGINT interrupt a call on ranks, also if the process inherited an ignored SIGINT.

A shell starts each background job of a script with SIGINT ignored, and Python then raises no
KeyboardInterrupt. A call on ranks can take hours, so it handles SIGINT while it runs. Other signals
are not changed: SIGHUP and SIGTERM are ignored only if the user asked for it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def _is_shut_out() -> bool:
    """Whether SIGINT is ignored or blocked in this process."""
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return is_ignored or signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# Checked when shardproof is imported; what the program itself changes later is respected.
_inherited = threading.current_thread() is threading.main_thread() and _is_shut_out()


@contextmanager
def listening() -> Iterator[None]:
    """A context in which SIGINT raises KeyboardInterrupt in the main thread, even if ignored."""
    if not (
        _inherited and threading.current_thread() is threading.main_thread() and _is_shut_out()
    ):
        yield
        return
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        if is_ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield
    finally:
        if is_ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
