"""Ranks as processes: started once, they meet in a file, and serve calls until they are closed.

They are fresh interpreters, neither forked (which breaks MKL and threads) nor spawned by
multiprocessing (which imports the caller's `__main__` again and so breaks notebooks). Functions
and results travel through files in a private folder. POSIX only.
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
from shardproof.engines import interpreter, parcel
from shardproof.engines.base import Ranks, Settings
from shardproof.engines.board import Board
from shardproof.engines.capacity import WAY_OUT
from shardproof.engines.failure import verdict
from shardproof.engines.watch import Watch, Worker
from shardproof.errors import UsageError
from shardproof.numerics import mode

_WORKER = """
from pathlib import Path
from shardproof.engines.worker import main
main(Path(sys.argv[1]), int(sys.argv[2]))
"""
# torchrun's, true for the launcher at most.
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
        self._met: tuple[str, str] | None = None
        self._number = 0  # of the call at hand: a late answer to an earlier one is none to this
        self._folder = _make_folder()
        self._workers: list[Worker] = []
        # Also when the caller forgets to close, or raises, or the interpreter ends.
        self._clean_up = weakref.finalize(self, _clean_up, self._workers, self._folder, os.getpid())
        try:
            parcel.write(settings, self._folder / parcel.SETTINGS, what="the settings")
            self._board = _make_board(self._folder / parcel.BOARD, self.degree)
            for rank in range(self.degree):
                self._workers.append(_start(rank, settings, self._folder, environment))
        except BaseException:
            self._clean_up()
            raise

    @property
    def transport(self) -> str:
        """What the ranks chose when they met; waits for that."""
        return self._meet()[0]

    @property
    def transport_note(self) -> str:
        """Why the ranks do not share memory; waits until they have met."""
        return self._meet()[1]

    def _meet(self) -> tuple[str, str]:
        if self._met is None:
            self.run(_nothing)
        return self._met or ("", "")

    def _run(self, fn: Callable[[Axis], Any]) -> list[Any]:
        if self._met is None:
            self._met = self._call(_describe)[0]
        return self._call(fn)

    def _call(self, fn: Callable[[Axis], Any]) -> list[Any]:
        what = f"the function {getattr(fn, '__qualname__', repr(fn))}"
        parcel.write(fn, self._folder / parcel.CALL, what=what)
        self._number += 1
        watch = Watch(
            self._workers,
            self._board,
            self._folder,
            number=self._number,
            timeout=self._settings.timeout,
        )
        try:
            for each in self._workers:
                with contextlib.suppress(BrokenPipeError):  # it is dead, which the watch sees
                    each.connection.send((parcel.RUN, self._number))
            failures = watch.follow()
        except BaseException:  # KeyboardInterrupt above all
            self._is_broken = True
            self._clean_up()
            raise
        if failures:
            self._is_broken = True
            self._clean_up()
            raise verdict(failures, self.degree)
        return [self._take_result(rank) for rank in range(self.degree)]

    def _take_result(self, rank: int) -> Any:
        path = parcel.result_path(self._folder, rank, self._number)
        try:
            return parcel.read(path, what=f"the result of rank {rank}")
        finally:
            path.unlink()

    def _close(self) -> None:
        """Let the workers end by themselves; those that do not are ended."""
        for each in self._workers:
            with contextlib.suppress(OSError):  # dead already
                each.connection.send((parcel.CLOSE, self._number))
        deadline = time.monotonic() + _CLOSING
        for each in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(max(0.0, deadline - time.monotonic()))
        self._clean_up()


def _describe(axis: Axis) -> tuple[str, str]:
    return axis.transport.name, axis.transport_note


def _nothing(axis: Axis) -> None:
    """What is run for the sake of meeting."""


def _make_folder() -> Path:
    """A folder for the owner alone."""
    try:
        return Path(tempfile.mkdtemp(prefix="shardproof-"))  # mode 0700
    except OSError as error:
        raise UsageError(
            f"engine='processes' needs a folder for temporary files, and none can be made: {error}."
            " Set TMPDIR to a directory where you may create files."
        ) from error


def _make_board(path: Path, degree: int) -> Board:
    try:
        return Board.create(path, degree)
    except OSError as error:
        raise parcel.no_room(path, error) from error


def _start(
    rank: int, settings: Settings, folder: Path, environment: Mapping[str, str] | None
) -> Worker:
    command = interpreter.command(_WORKER, str(folder), str(rank))
    try:
        ours, theirs = (interpreter.above_standard(end.detach()) for end in socket.socketpair())
        connection = Connection(ours)
        try:
            process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=interpreter.output(1),
                stderr=interpreter.output(2),
                env=_environment(rank, settings, environment),
                cwd=interpreter.directory() or Path(os.sep),
                # Ctrl-C is for the launcher; a worker's children are its group
                start_new_session=True,
            )
        finally:
            os.close(theirs)
    except (OSError, MemoryError) as error:
        raise UsageError(
            f"cannot start the process of rank {rank} of {settings.degree}: {error}. {WAY_OUT}"
        ) from error
    return Worker(rank, process, connection)


def _environment(rank: int, settings: Settings, given: Mapping[str, str] | None) -> dict[str, str]:
    if given is None:
        given = interpreter.environment() | mode.child_environment()
    environment = {name: value for name, value in given.items() if name not in _NOT_INHERITED}
    environment |= {
        "OMP_NUM_THREADS": str(settings.threads),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(settings.degree),
        "LOCAL_WORLD_SIZE": str(settings.degree),
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks are all on this machine
    return environment


def _clean_up(workers: Sequence[Worker], folder: Path, owner: int) -> None:
    """End what still runs, with whatever it has started, and remove the folder."""
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
