"""Processes that go through models, one after another; a crash or a hang costs only one model.

A process imports torch and transformers once and then takes names. It is ended, with all that it
started, when a model runs over its time, and a new one takes the next name.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import IO, Any

START_LIMIT = 180.0  # seconds for the imports
Row = dict[str, Any]


class Child:
    """A process that does steps with models, and is started again where it ended.

    Args:
        work: (name, step) -> row. It has to be importable: the process imports it by its name.
        limit: seconds for one model and step.
    """

    def __init__(self, work: Callable[[str, str], Row], limit: float) -> None:
        self._work = work
        self._limit = limit
        self._process: Any = None
        self._pipe: Connection
        self._errors: IO[str]

    def ask(self, name: str, step: str) -> Row:
        """The row of a model and step; with a "reason" where the process crashed or hung."""
        begun = time.monotonic()
        try:
            if self._process is None:
                self._start()
                begun = time.monotonic()
            self._pipe.send((name, step))
            if not self._pipe.poll(self._limit):
                self.end()
                return _failed(name, step, f"it ran over its limit of {self._limit:g} s", begun)
            row: Row = self._pipe.recv()
        except (EOFError, OSError):
            return _failed(name, step, self._how_it_ended(), begun)
        return row | {"seconds": round(time.monotonic() - begun, 2)}

    def end(self) -> None:
        """End the process and what it started."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()  # it ended, or has not made a group of its own yet
        self._process.join()
        self._pipe.close()
        self._errors.close()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        self._process = context.Process(target=_serve, args=(theirs, self._work))
        with _stderr_to(self._errors):
            self._process.start()
        theirs.close()
        if not self._pipe.poll(START_LIMIT):
            raise EOFError
        self._pipe.recv()

    def _how_it_ended(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        self.end()
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
        last = f"; it last said: {said[-1]}" if said else ""
        return f"its process ended with {how}{last}"


def _failed(name: str, step: str, reason: str, begun: float) -> Row:
    seconds = round(time.monotonic() - begun, 2)
    return {"name": name, "step": step, "reason": reason, "seconds": seconds}


class _stderr_to:  # noqa: N801 - used like a function
    """A context in which a process that is started gets `file` as its standard error."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __enter__(self) -> None:
        self._kept = os.dup(2)
        os.dup2(self._file.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)


def _serve(pipe: Connection, work: Callable[[str, str], Row]) -> None:
    """Answer names with rows until the other side is gone."""
    os.setsid()
    warnings.simplefilter("ignore")
    pipe.send("ready")
    while True:
        try:
            name, step = pipe.recv()
        except EOFError:
            return
        pipe.send(_row(work, name, step))


def _row(work: Callable[[str, str], Row], name: str, step: str) -> Row:
    row: Row = {"name": name, "step": step}
    try:
        return row | work(name, step)
    except Exception as error:  # any error of a model is a row of the report
        told = " ".join(str(error).split())
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"
        return row | {"reason": f"{type(error).__name__}: {told[:300]} ({where})"}
