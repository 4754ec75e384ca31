"""`StopSignal`: SIGTERM and SIGINT ask a training to stop, after the same step on all ranks."""

import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from shardproof.axis import Axis
from shardproof.errors import UsageError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun sends its ranks a signal that a terminal has sent them already: that is one signal.
_ONE_SIGNAL = 0.5  # seconds
_FLAG = "stop"


class StopSignal:
    """A context in which the first SIGTERM or SIGINT asks for a stop; the second ends the process.

    Signals within half a second count as one, because torchrun repeats what a terminal sends.

    Enter it in the main thread of the process that is signalled: around `sp.launch`, whose ranks
    then see the request, or in each rank under torchrun. It may be sent to ranks by closure.

    Raises:
        UsageError: it was not entered in the main thread, or was entered already.

    Example:
        with sp.StopSignal() as stop:
            sp.launch(lambda axis: train(axis, stop), degree=2)
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._owner: _Handlers | None = None

    def __enter__(self) -> "StopSignal":
        if self._owner is not None or self._folder is not None:
            raise UsageError("a StopSignal was entered already. Make another one.")
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "a StopSignal must be entered in the main thread: Python handles signals there. "
                "Enter it around launch(), not in the function of a rank."
            )
        self._owner = _Handlers(self)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="shardproof-stop-"))
        except BaseException:
            self._owner.remove()
            self._owner = None
            raise
        if self._owner.has_come:  # before there was a folder to say so in
            self._say_in_folder()
        return self

    def __exit__(self, *_: object) -> None:
        if self._owner is not None and self._folder is not None:
            self._owner.remove()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._owner = self._folder = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_owner": None}

    def _say_in_folder(self) -> None:
        """Tell other processes that a signal has come, if there is a folder already."""
        if self._folder is not None:
            self._folder.mkdir(exist_ok=True)  # a cleaner of temporary files removes it
            flag = os.open(self._folder / _FLAG, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            os.close(flag)

    def on_request(self) -> None:
        """Called in the signal handler when the first signal comes."""

    def before_ending(self) -> None:
        """Called when a second signal comes, before the earlier handlers get it."""

    @property
    def was_requested_here(self) -> bool:
        """Whether the process of this rank knows of a request; other ranks may not know it yet."""
        if self._owner is not None and self._owner.has_come:
            return True
        return self._folder is not None and (self._folder / _FLAG).exists()

    def is_requested(self, axis: Axis) -> bool:
        """Whether any rank knows of a request: the same answer on all ranks.

        Args:
            axis: the ranks; all of them call this.

        Comm:
            setup none in the ledger: small objects of all ranks go to all, uncounted.
        """
        return any(axis.gather_small(self.was_requested_here, what="whether to stop"))


class _Handlers:
    """The signal handlers while a `StopSignal` is entered."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._came = 0.0
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    @property
    def has_come(self) -> bool:
        """Whether a signal has come."""
        return self._came > 0.0

    def remove(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._came:
            self._came = now
            self._stop._say_in_folder()
            self._stop.on_request()
        elif now - self._came > _ONE_SIGNAL:
            self.remove()
            self._stop.before_ending()
            if self._before[signal.Signals(number)] is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
