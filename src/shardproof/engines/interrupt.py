"""SIGINT reaches whoever waits for ranks, also where the process has inherited that it is ignored.

A shell starts every background job of a script with SIGINT ignored, without being asked, and
Python then raises no KeyboardInterrupt. A call on ranks can take hours, so it listens while it
runs. Other signals stay as they were inherited: SIGHUP and SIGTERM are ignored only where somebody
asked for it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def _is_shut_out() -> bool:
    """Whether SIGINT does not reach this process as things are: ignored, or blocked."""
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return is_ignored or signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# Looked at when shardproof is imported: what the program itself does later is its own choice.
_inherited = threading.current_thread() is threading.main_thread() and _is_shut_out()


@contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt in the main thread although it was ignored."""
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
