"""`Watch`: follow one call on worker processes, and find the rank that caused a failure.

The launcher watches the messages of the workers, whether their processes live, and the status file
in which they write their collectives. A rank that returned while others entered one more collective
has left them waiting. The counts in the status file show this, so that no timeout is needed.
"""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from shardproof.engines import messages
from shardproof.engines.failure import Failure
from shardproof.engines.status import StatusFile
from shardproof.transport.base import name_ranks, name_waits

# Seconds that the launcher listens on after a cause, and after a symptom only, was reported.
_AFTER_CAUSE = 0.5
_AFTER_SYMPTOM = 3.0
_POLL = 0.1


class Process(Protocol):
    """What the launcher needs of a process that it has started; a `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The same, after its end; raises subprocess.TimeoutExpired if that does not come."""


@dataclass(frozen=True)
class Worker:
    """A worker process and its connection, in the launcher."""

    rank: int
    process: Process
    connection: Connection


class Watch:
    """Follows one call until all ranks have returned, or enough is known about a failure.

    Args:
        workers: the workers in rank order.
        status_file: the file in which they write their collectives.
        folder: the folder with their failures.
        number: number of the call; answers with another number are ignored.
        timeout: seconds of the timeout, for messages.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        status_file: StatusFile,
        folder: Path,
        *,
        number: int,
        timeout: float,
    ) -> None:
        self._workers = workers
        self._status_file = status_file
        self._folder = folder
        self._number = number
        self._timeout = timeout
        self._counts: dict[int, int] = {}  # rank that has returned -> number of its collectives
        self._failures: dict[int, Failure] = {}
        self._mute: set[int] = set()  # ranks whose connection is closed
        self._deadline = float("inf")

    def follow(self) -> list[Failure]:
        """Wait for the ranks; return all failures, which are none if all ranks have returned."""
        while self._pending() and time.monotonic() < self._deadline:
            self._listen()
            self._find_dead()
            self._find_deserter()
            self._find_stopped()
        self._find_uneven()
        self._find_missing()
        return list(self._failures.values())

    def _pending(self) -> list[Worker]:
        return [
            worker
            for worker in self._workers
            if worker.rank not in self._counts and worker.rank not in self._failures
        ]

    def _fail(self, failure: Failure) -> None:
        self._failures.setdefault(failure.rank, failure)
        patience = _AFTER_SYMPTOM if failure.is_symptom else _AFTER_CAUSE
        self._deadline = min(self._deadline, time.monotonic() + patience)

    def _listen(self) -> None:
        speaking = {
            worker.connection: worker.rank
            for worker in self._pending()
            if worker.rank not in self._mute
        }
        if not speaking:
            time.sleep(_POLL)
        for connection in wait(list(speaking), timeout=_POLL) if speaking else ():
            if not isinstance(connection, Connection):
                continue
            rank = speaking[connection]
            try:
                number, outcome, count = connection.recv()
            except (EOFError, OSError):
                self._mute.add(rank)
                continue
            if number != self._number:
                continue
            if outcome == messages.RETURNED:
                self._counts[rank] = count
            elif isinstance(outcome, Failure):
                self._fail(outcome)
            else:
                path = messages.failure_path(self._folder, rank, number)
                self._fail(messages.read(path, what=f"the failure of rank {rank}"))

    def _find_dead(self) -> None:
        for worker in self._pending():
            code = worker.process.poll()
            # A last message may still be in the connection of a process that has ended.
            if code is None or (worker.rank not in self._mute and worker.connection.poll()):
                continue
            self._fail(Failure(worker.rank, _describe_exit(code), is_death=True))

    def _find_deserter(self) -> None:
        """Report a rank that has returned while another rank waits for it."""
        if not self._counts or self._failures:
            return
        fewest = min(self._counts, key=lambda rank: (self._counts[rank], rank))
        waiting = [
            worker.rank
            for worker in self._pending()
            if self._is_waiting_for(worker.rank, self._counts[fewest])
        ]
        if waiting:
            self._fail(Failure(fewest, f"returned and will not come: {self._waits(waiting)}"))

    def _is_waiting_for(self, rank: int, count: int) -> bool:
        place = self._status_file.read(rank)
        return place.is_waiting and place.begun > count

    def _find_uneven(self) -> None:
        """Report a rank that has returned after fewer collectives than another rank."""
        if self._failures:
            return
        fewest = min(self._counts, key=lambda rank: (self._counts[rank], rank))
        most = max(self._counts, key=lambda rank: (self._counts[rank], -rank))
        if self._counts[fewest] != self._counts[most]:
            self._fail(
                Failure(
                    fewest,
                    f"returned after {self._counts[fewest]} collectives, rank {most} after "
                    f"{self._counts[most]}, the last of them {self._status_file.read(most).text}. "
                    "All ranks must make the same calls.",
                )
            )

    def _find_stopped(self) -> None:
        """If only symptoms are known, report the ranks that were stopped by a signal."""
        if not self._has_only_symptoms():
            return
        stopped = {
            worker.rank: number
            for worker in self._pending()
            if (number := _stopping_signal(worker.process.pid)) is not None
        }
        if stopped:
            number = next(iter(stopped.values()))
            self._blame(list(stopped), f"was stopped by {signal.Signals(number).name} and ")

    def _find_missing(self) -> None:
        """If only symptoms are known, report the ranks that are not in the others' collective."""
        if not self._has_only_symptoms():
            return
        latest = max(self._status_file.read(worker.rank).begun for worker in self._workers)
        missing = [
            worker.rank
            for worker in self._pending()
            if not self._is_waiting_for(worker.rank, latest - 1)
        ]
        if missing:
            self._blame(missing, "")

    def _has_only_symptoms(self) -> bool:
        return bool(self._failures) and all(each.is_symptom for each in self._failures.values())

    def _blame(self, missing: Sequence[int], what: str) -> None:
        """Report the first missing rank as the cause, and name the others."""
        symptom = next(iter(self._failures.values()))
        within = f" within {self._timeout:g} s" if _is_timeout(symptom) else ""
        others = f", nor did {name_ranks(missing[1:])}" if missing[1:] else ""
        waiting = [
            worker.rank
            for worker in self._workers
            if worker.rank not in missing and self._status_file.read(worker.rank).is_waiting
        ]
        waits = self._waits(waiting)
        self._fail(Failure(missing[0], f"{what}did not come{within}{others}: {waits}"))

    def _waits(self, ranks: Sequence[int]) -> str:
        return name_waits({rank: self._status_file.read(rank).text for rank in ranks})


def _is_timeout(failure: Failure) -> bool:
    # Parts of gloo's message and of ours.
    return any(words in failure.summary.lower() for words in ("timed out", "did not come within"))


def _stopping_signal(pid: int) -> int | None:
    """The signal by which a child is stopped now, or None."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return None
    try:
        status = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # its end was collected in the meantime
        return None
    return None if status is None else status.si_status


def _describe_exit(code: int) -> str:
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        # The system then discards exit codes, and Python reports 0.
        return (
            "is gone: its process has ended, and how is not known, for this process ignores SIGCHLD"
        )
    if code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"left early: its process ended with exit code {code}"
