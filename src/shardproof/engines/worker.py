"""The main program of a rank as a process: connect, serve calls, end with the launcher.

`engines/processes.py` starts it with a socket to the launcher as its standard input. When the
launcher ends, the socket closes, and the worker ends itself and all processes that it started.
"""

import atexit
import contextlib
import io
import os
import queue
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardproof.axis import Axis
from shardproof.checkpoint import background
from shardproof.engines import fork, interpreter, messages
from shardproof.engines.engine import Settings
from shardproof.engines.failure import Failure, failure_of
from shardproof.engines.status import StatusFile
from shardproof.error_text import TooLong, within
from shardproof.errors import UsageError
from shardproof.timeout import START_TIMEOUT
from shardproof.transport.base import Call
from shardproof.transport.choose import TransportChoice, choose, meet
from shardproof.transport.distributed import DistributedTransport
from shardproof.transport.ledger import Ledger
from shardproof.transport.shared_memory import SharedTransport
from shardproof.transport.solo import SoloTransport

_Commands = queue.SimpleQueue[tuple[str, int]]  # a word of the launcher and the number of the call
_PICKLING = 5.0  # seconds that pickling an exception may take


def main(folder: Path, rank: int) -> None:
    """Serve the launcher that owns `folder`, as rank `rank`, until it ends this worker."""
    connection = _take_connection()
    commands: _Commands = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, commands, folder), daemon=True).start()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # line buffering, so that ranks do not mix their lines
    worker = _Worker(folder, rank)
    while (command := commands.get())[0] == messages.RUN:
        connection.send(worker.serve(command[1]))
    if dist.is_initialized():
        dist.destroy_process_group()
    _end()


def _end() -> NoReturn:
    """End the process without freeing memory first, because unloading torch is slow."""
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads that are no daemons
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # nobody reads the output any more
        fork.flush()
    os._exit(0)


class _Worker:
    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._settings: Settings = messages.read(folder / messages.SETTINGS, what="the settings")
        self._status_file = StatusFile(folder / messages.STATUS_FILE)
        self._joining: BaseException | None = None
        self._choice: TransportChoice | None = None  # None at degree 1
        self._count = 0  # number of collectives begun over gloo
        torch.set_num_threads(self._settings.threads)
        try:
            self._join()
        except Exception as error:  # reported to the launcher on request
            self._joining = error

    def serve(self, number: int) -> tuple[int, str | Failure, int]:
        """Run the function in the folder, as call `number`.

        Returns:
            `number`, the outcome, and the number of collectives so far.
        """
        owner = os.getpid()
        outcome: str | Failure = messages.RETURNED
        try:
            if self._joining is not None:
                raise self._joining
            self._call(number, owner)
            fork.flush()
        except BaseException as error:
            fork.end_if_forked(owner, self._rank, error)
            outcome = self._write_failure(number, error)
            with contextlib.suppress(OSError, ValueError):  # only the failure is reported
                fork.flush()
        return number, outcome, self._collectives()

    def _call(self, number: int, owner: int) -> None:
        fn: Callable[[Axis], Any] = messages.read(self._folder / messages.CALL, what="the function")
        result = fn(self._axis())
        fork.end_if_forked(owner, self._rank)
        background.finish_all()  # the launcher may end this process as soon as it has the result
        what = f"the result of rank {self._rank}, of type {type(result).__name__},"
        path = messages.result_path(self._folder, self._rank, number)
        try:
            within(self._settings.timeout, lambda: messages.write(result, path, what=what))
        except TooLong as error:
            raise UsageError(
                f"{what} cannot be pickled: {error}. Return plain values or tensors, or use "
                "engine='threads'."
            ) from None

    def _write_failure(self, number: int, error: BaseException) -> str | Failure:
        """Write the failure with the error to the folder; as text if it cannot be pickled."""
        failure = failure_of(self._rank, error)
        path = messages.failure_path(self._folder, self._rank, number)
        draft = path.with_suffix(".draft")  # a path to which a slow pickle may still write

        def write() -> None:
            messages.write(failure, draft, what="an exception")
            # Some errors can be pickled, but not unpickled.
            messages.read(draft, what="an exception")

        try:
            within(_PICKLING, write)
            draft.replace(path)
        except Exception:  # code of the error may raise anything
            return replace(failure, error=None)
        return messages.FAILED

    def _join(self) -> None:
        degree, timeout = self._settings.degree, self._settings.timeout
        if degree == 1:
            return
        meet(
            "gloo",
            store=dist.FileStore(str(self._folder / messages.STORE), degree),
            rank=self._rank,
            world_size=degree,
            timeout=timedelta(seconds=max(timeout, START_TIMEOUT)),
        )
        self._choice = choose(
            self._group(),
            self._settings.transport,
            timeout=timeout,
            compare_inputs=self._settings.compare_inputs,
            observer=self._observe,
        )

    def _axis(self) -> Axis:
        """A new axis with an empty ledger."""
        if self._choice is None:
            return Axis("tp", SoloTransport())
        transport = self._choice.transport
        if isinstance(transport, SharedTransport):
            transport.ledger = Ledger()  # the shared memory stays while the ranks do
            transport.forget_notes()
        else:
            transport = self._group()
        group = weakref.ref(distributed_c10d._get_default_group())
        return Axis("tp", transport, self._choice.note, group=group)

    def _group(self) -> DistributedTransport:
        transport = DistributedTransport(
            distributed_c10d._get_default_group(),
            timeout=self._settings.timeout,
            observer=self._observe_group,
        )
        if not self._settings.compare_inputs:
            transport.notes = None
        return transport

    def _collectives(self) -> int:
        """Number of collectives begun so far, on any transport."""
        transport = self._choice.transport if self._choice is not None else None
        return self._count + (transport.calls if isinstance(transport, SharedTransport) else 0)

    def _observe_group(self, call: Call | None, is_new: bool) -> None:
        self._count += is_new  # the launcher compares this count with those of returned ranks
        self._observe(call)

    def _observe(self, call: Call | None) -> None:
        if call is None:
            self._status_file.end(self._rank)
        else:
            self._status_file.begin(self._rank, self._collectives(), str(call))


def _take_connection() -> Connection:
    """Take the socket to the launcher; the user's code then has an empty standard input."""
    connection = Connection(interpreter.above_standard(os.dup(0)))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return connection


def _listen(connection: Connection, commands: _Commands, folder: Path) -> None:
    """Pass on the words of the launcher; when it has ended, clean up and end at once."""
    while True:
        try:
            commands.put(connection.recv())
        except (EOFError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            if os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)
            os._exit(1)
