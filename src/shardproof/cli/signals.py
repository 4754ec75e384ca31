"""SIGTERM, SIGHUP and SIGINT end a command in order: its ranks, its folders, its exit code.

A signal raises an exception in the main thread, so that ranks are ended, folders are removed, and
the exit code says which signal came. If the main thread waits in C and does not get that far,
another thread runs the exit functions and ends the process. A signal that was ignored before
(SIGHUP under nohup) stays ignored.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from shardproof import torchrun
from shardproof.stop_signal import StopSignal

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_PATIENCE = 5.0  # seconds that the main thread may take; torchrun gives a rank 30


_is_deferred = threading.Event()  # a command answers signals itself


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


class CommandStop(StopSignal):
    """A `StopSignal` of a command: a second signal ends the command as every other command."""

    def __enter__(self) -> "CommandStop":
        _is_deferred.set()
        try:
            super().__enter__()
        except BaseException:
            _is_deferred.clear()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        _is_deferred.clear()

    def on_request(self) -> None:
        """Say on standard error what happens now; under torchrun rank 0 alone says it."""
        if not torchrun.is_other_rank(os.environ):
            with contextlib.suppress(OSError):  # nobody can be told
                os.write(
                    2, b"stopping: this step is finished and saved; a second signal ends now\n"
                )

    def before_ending(self) -> None:
        """End the process after a while, if the main thread is stuck."""
        _is_deferred.clear()


def _watch(read_end: int, numbers: set[signal.Signals], is_over: threading.Event) -> None:
    while numbers_read := os.read(read_end, 1):
        is_deferred = _is_deferred.is_set() and numbers_read[0] == signal.SIGTERM
        is_mine = numbers_read[0] in numbers and not is_deferred
        if is_mine and not is_over.wait(_PATIENCE):
            end_now(128 + numbers_read[0])


def end_now(code: int) -> NoReturn:
    """End the process without waiting for threads; folders and processes of ranks are removed."""
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
    finally:
        os._exit(code)
