"""`ProcessRanks`: ranks as processes, which are started once and serve calls until closed.

The processes are fresh interpreters. They are not forked, which breaks MKL and threads, and not
spawned by multiprocessing, which imports the caller's `__main__` again and so breaks notebooks.
Functions and results are passed as files in a private folder. POSIX only.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shardproof.axis import Axis
from shardproof.engines import interpreter, messages
from shardproof.engines.capacity import WAY_OUT
from shardproof.engines.engine import Ranks, Settings
from shardproof.engines.failure import verdict
from shardproof.engines.status import StatusFile
from shardproof.engines.watch import Process, Watch, Worker
from shardproof.errors import UsageError
from shardproof.numerics import mode

_WORKER = """
from pathlib import Path
from shardproof.engines.worker import main
main(Path(sys.argv[1]), int(sys.argv[2]))
"""
# Variables of torchrun, which are valid for the launcher at most.
_NOT_INHERITED = ("MASTER_ADDR", "MASTER_PORT")
_CLOSING = 5.0


class ProcessRanks(Ranks):
    """One process per rank, kept between calls.

    Args:
        settings: of the ranks.
        environment: the variables that the processes start with; None: those of this process, and
            its BLAS mode.
    """

    engine = "processes"

    def __init__(self, settings: Settings, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(settings)
        self._transport_and_note: tuple[str, str] | None = None
        self._number = 0  # number of the current call; later answers to earlier calls are ignored
        self._folder = _make_folder()
        self._workers: list[Worker] = []
        # This also runs if the caller forgets to close or raises, or if the interpreter ends.
        self._clean_up = weakref.finalize(self, _clean_up, self._workers, self._folder, os.getpid())
        try:
            messages.write(settings, self._folder / messages.SETTINGS, what="the settings")
            self._status_file = _make_status_file(self._folder / messages.STATUS_FILE, self.degree)
            for rank in range(self.degree):
                self._workers.append(_start(rank, settings, self._folder, environment))
        except BaseException:
            self._clean_up()
            raise

    @property
    def transport(self) -> str:
        """The transport that the ranks chose; waits until they have connected."""
        return self._meet()[0]

    @property
    def transport_note(self) -> str:
        """Why the ranks do not share memory; waits until they have connected."""
        return self._meet()[1]

    def _meet(self) -> tuple[str, str]:
        if self._transport_and_note is None:
            self.run(_nothing)
        return self._transport_and_note or ("", "")

    def _run(self, fn: Callable[[Axis], Any]) -> list[Any]:
        if self._transport_and_note is None:
            self._transport_and_note = self._call(_describe)[0]
        return self._call(fn)

    def _call(self, fn: Callable[[Axis], Any]) -> list[Any]:
        what = f"the function {getattr(fn, '__qualname__', repr(fn))}"
        messages.write(fn, self._folder / messages.CALL, what=what)
        self._number += 1
        watch = Watch(
            self._workers,
            self._status_file,
            self._folder,
            number=self._number,
            timeout=self._settings.timeout,
        )
        try:
            for each in self._workers:
                with contextlib.suppress(BrokenPipeError):  # it has ended, which the watch reports
                    each.connection.send((messages.RUN, self._number))
            failures = watch.follow()
        except BaseException:  # KeyboardInterrupt in particular
            self._is_broken = True
            self._clean_up()
            raise
        if failures:
            self._is_broken = True
            self._clean_up()
            raise verdict(failures, self.degree)
        return [self._take_result(rank) for rank in range(self.degree)]

    def _take_result(self, rank: int) -> Any:
        path = messages.result_path(self._folder, rank, self._number)
        try:
            return messages.read(path, what=f"the result of rank {rank}")
        finally:
            path.unlink()

    def _close(self) -> None:
        """Ask the workers to end; kill those that do not."""
        for each in self._workers:
            with contextlib.suppress(OSError):  # it has ended already
                each.connection.send((messages.CLOSE, self._number))
        deadline = time.monotonic() + _CLOSING
        for each in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(max(0.0, deadline - time.monotonic()))
        self._clean_up()


def _describe(axis: Axis) -> tuple[str, str]:
    return axis.transport.name, axis.transport_note


def _nothing(axis: Axis) -> None:
    """A function that does nothing, run so that the ranks connect."""


def _make_folder() -> Path:
    """Create a folder that only this user can read."""
    try:
        return Path(tempfile.mkdtemp(prefix="shardproof-"))  # mode 0700
    except OSError as error:
        raise UsageError(
            f"engine='processes' needs a folder for temporary files, and none can be made: {error}."
            " Set TMPDIR to a directory where you may create files."
        ) from error


def _make_status_file(path: Path, degree: int) -> StatusFile:
    try:
        return StatusFile.create(path, degree)
    except OSError as error:
        raise messages.no_room(path, error) from error


def _start(
    rank: int, settings: Settings, folder: Path, environment: Mapping[str, str] | None
) -> Worker:
    command = interpreter.command(_WORKER, str(folder), str(rank))
    try:
        ours, theirs = (interpreter.above_standard(end.detach()) for end in socket.socketpair())
        connection = Connection(ours)
        try:
            process = start_process(
                command,
                stdin=theirs,
                environment=_environment(rank, settings, environment),
                directory=interpreter.directory() or Path(os.sep),
            )
        finally:
            os.close(theirs)
    except (OSError, MemoryError) as error:
        raise UsageError(
            f"cannot start the process of rank {rank} of {settings.degree}: {error}. {WAY_OUT}"
        ) from error
    return Worker(rank, process, connection)


def start_process(
    command: list[str], *, stdin: int, environment: dict[str, str], directory: Path
) -> Process:
    """Start the interpreter of a rank, with this process's output; it leads a new session.

    Ctrl-C is for the launcher, and what a worker has started is in the worker's group.
    """
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=interpreter.output(1),
        stderr=interpreter.output(2),
        env=environment,
        cwd=directory,
        start_new_session=True,
    )


def _environment(
    rank: int, settings: Settings, variables: Mapping[str, str] | None
) -> dict[str, str]:
    if variables is None:
        variables = interpreter.environment() | mode.child_environment()
    environment = {name: value for name, value in variables.items() if name not in _NOT_INHERITED}
    environment |= {
        "OMP_NUM_THREADS": str(settings.threads),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(settings.degree),
        "LOCAL_WORLD_SIZE": str(settings.degree),
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    return environment


def _clean_up(workers: Sequence[Worker], folder: Path, owner: int) -> None:
    """Kill workers that still run, with their children, and remove the folder."""
    if os.getpid() != owner:
        return  # a fork of the launcher has this too, and must leave the workers alone
    for each in workers:
        # The group outlives a worker that died and left children behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(each.process.pid, signal.SIGKILL)
    for each in workers:
        each.process.wait()
        each.connection.close()
    shutil.rmtree(folder, ignore_errors=True)
