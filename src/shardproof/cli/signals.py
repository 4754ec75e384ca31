"""SIGTERM, SIGHUP and SIGINT end a command in order: its ranks, its folders, its exit code.

A signal raises an exception in the main thread, so that ranks are ended, folders are removed, and
the exit code says which signal came. If the main thread waits in C and does not get that far,
another thread runs the exit functions and ends the process. A signal that was ignored before
(SIGHUP under nohup) stays ignored.
"""

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_PATIENCE = 5.0  # seconds that the main thread may take; torchrun gives a rank 30


class Ended(SystemExit):
    """Raised in the main thread by a signal; its code is 128 and the signal's number."""


class Ending:
    """The signal handler, and the exit code that a signal asks for.

    Attributes:
        code: for the exit of the process; 0 if no signal came.
    """

    def __init__(self) -> None:
        self.code = 0
        self._came = 0.0

    def handle(self, number: int, _: FrameType | None) -> None:
        """The handler. A terminal that closes sends several signals: the first one counts."""
        now = time.monotonic()
        if self.code and now - self._came < _PATIENCE:
            return
        self.code, self._came = 128 + number, now
        raise Ended(self.code)


@contextmanager
def ending_in_order() -> Iterator[Ending]:
    """Inside, signals end the process in order. Outside of the main thread it does nothing."""
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    mine = [number for number in ENDING if before[number] is signal.SIG_DFL]
    interrupt = signal.getsignal(signal.SIGINT)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, *mine])
    if interrupt is signal.SIG_IGN:  # as it is in every background job of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with _watched(mine):
        for number in mine:
            signal.signal(number, ending.handle)
        try:
            yield ending
        finally:
            for number in mine:
                signal.signal(number, before[number])
    if interrupt is signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _watched(numbers: list[signal.Signals]) -> Iterator[None]:
    """Inside, a signal ends the process after a while even if the main thread is stuck."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    is_over = threading.Event()
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(read_end, set(numbers), is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        is_over.set()
        os.close(write_end)  # the thread reads the end
        thread.join()
        os.close(read_end)


def _watch(read_end: int, numbers: set[signal.Signals], is_over: threading.Event) -> None:
    while numbers_read := os.read(read_end, 1):
        if numbers_read[0] in numbers and not is_over.wait(_PATIENCE):
            try:
                atexit._run_exitfuncs()  # folders of tempfile, processes of ranks
            finally:
                os._exit(128 + numbers_read[0])
