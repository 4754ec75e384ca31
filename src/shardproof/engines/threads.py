"""`ThreadRanks`: ranks as threads of this process, which need no pickling and share tensors.

Threads cannot be killed. When a rank fails, ranks that wait in a collective raise at once, and a
rank that computes gets an exception at its next Python instruction. A rank that is stuck outside
Python is abandoned; it does not keep the process from ending.
"""

import contextlib
import ctypes
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardproof.axis import Axis
from shardproof.checkpoint import background
from shardproof.engines import random_state
from shardproof.engines.capacity import WAY_OUT
from shardproof.engines.engine import Ranks, Settings
from shardproof.engines.failure import Failure, failure_of, verdict
from shardproof.engines.fork import end_if_forked
from shardproof.errors import UsageError
from shardproof.transport.base import Transport
from shardproof.transport.disabled import OVER, disable
from shardproof.transport.rendezvous import Rendezvous
from shardproof.transport.solo import SoloTransport
from shardproof.transport.threads import ThreadsTransport, waits_note

# Seconds after a failure in which other ranks may notice it themselves, then be stopped.
_GRACE = 3.0
_STOPPING = 1.0
_LONGEST_WAIT = 0.5  # seconds until a signal is handled that did not end a wait


class _Stopped(SystemExit):
    """Raised inside a rank that computes while another has failed."""


@dataclass(frozen=True)
class _Outcome:
    rank: int
    result: Any = None
    failure: Failure | None = None


@dataclass(frozen=True)
class _Task:
    """One call of `fn` on one rank."""

    fn: Callable[[Axis], Any]
    transport: Transport
    rendezvous: Rendezvous
    outcomes: "queue.SimpleQueue[_Outcome]"
    note: str

    def attempt(self) -> _Outcome:
        rank, owner = self.transport.rank, os.getpid()
        try:
            result = self.fn(Axis("tp", self.transport, transport_note=self.note))
            background.finish_all()
        except _Stopped:
            return _Outcome(rank, failure=Failure(rank, "was stopped", is_symptom=True))
        except BaseException as error:
            end_if_forked(owner, rank, error)
            self.rendezvous.fail(rank, error)
            return _Outcome(rank, failure=failure_of(rank, error))
        end_if_forked(owner, rank)
        self.rendezvous.leave(rank)
        return _Outcome(rank, result)


_Inbox = queue.SimpleQueue[_Task | None]
_Ready = queue.SimpleQueue[Exception | None]


class ThreadRanks(Ranks):
    """One thread per rank, kept between calls."""

    engine = "threads"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if self.degree > 1:
            random_state.install()
        self._inboxes: list[_Inbox] = [queue.SimpleQueue() for _ in range(self.degree)]
        ready: _Ready = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_serve,
                args=(inbox, settings.threads, ready),
                name=f"shardproof-rank-{rank}",
                daemon=True,
            )
            for rank, inbox in enumerate(self._inboxes)
        ]
        weakref.finalize(self, _dismiss, self._inboxes)
        try:
            for thread in self._threads:
                thread.start()
        except (RuntimeError, MemoryError) as error:
            _dismiss(self._inboxes)
            raise UsageError(f"cannot start {self.degree} threads: {error}. {WAY_OUT}") from error
        for problem in [ready.get() for _ in self._threads]:
            if problem is not None:
                _dismiss(self._inboxes)
                raise UsageError(
                    f"a rank cannot have {settings.threads} threads: {problem}. Use fewer."
                ) from problem
        # Threads that start later inherit the last thread count that was set, so restore it.
        torch.set_num_threads(torch.get_num_threads())

    @property
    def transport(self) -> str:
        """The name of what carries bytes between the ranks."""
        return SoloTransport.name if self.degree == 1 else ThreadsTransport.name

    @property
    def transport_note(self) -> str:
        """Why the ranks wait in Python; empty if they wait in the core, or there is only one."""
        return "" if self.degree == 1 else waits_note()

    def _run(self, fn: Callable[[Axis], Any]) -> list[Any]:
        rendezvous = Rendezvous(self.degree, timeout=self._settings.timeout)
        outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        note = self.transport_note
        transports: list[Transport] = [
            SoloTransport() if self.degree == 1 else ThreadsTransport(rendezvous, rank)
            for rank in range(self.degree)
        ]
        for inbox, transport in zip(self._inboxes, transports, strict=True):
            if not self._settings.compare_inputs:
                transport.notes = None
            inbox.put(_Task(fn, transport, rendezvous, outcomes, note))
        outcome_by_rank: dict[int, _Outcome] = {}
        try:
            self._collect(outcomes, outcome_by_rank)
        except BaseException:  # KeyboardInterrupt above all
            self._break()
            rendezvous.interrupt("the caller was interrupted")
            self._stop(set(range(self.degree)) - set(outcome_by_rank))
            raise
        failures = [outcome.failure for outcome in outcome_by_rank.values() if outcome.failure]
        if not failures:
            for transport in (*transports, *rendezvous.transports()):
                disable(transport, OVER)  # otherwise a kept axis would sometimes still work
            return [outcome_by_rank[rank].result for rank in range(self.degree)]
        self._break()
        error = verdict(failures, self.degree)
        stuck = sorted(set(range(self.degree)) - set(outcome_by_rank))
        if stuck:
            error.add_note(
                f"Still running {_GRACE + _STOPPING:g} s later, and given up: ranks {stuck}. "
                "Threads cannot be killed; engine='processes' can."
            )
        raise error

    def _collect(
        self, outcomes: "queue.SimpleQueue[_Outcome]", outcome_by_rank: dict[int, _Outcome]
    ) -> None:
        """Collect every rank's outcome; after a failure, only the outcomes that come soon."""
        while len(outcome_by_rank) < self.degree:
            outcome = _next(outcomes)
            outcome_by_rank[outcome.rank] = outcome
            if outcome.failure:
                break
        _collect_until(time.monotonic() + _GRACE, outcomes, outcome_by_rank, self.degree)
        if len(outcome_by_rank) < self.degree:
            self._stop(set(range(self.degree)) - set(outcome_by_rank))
            _collect_until(time.monotonic() + _STOPPING, outcomes, outcome_by_rank, self.degree)

    def _stop(self, ranks: set[int]) -> None:
        """Raise in the threads of `ranks`, at their next Python instruction."""
        for rank in ranks:
            identity = self._threads[rank].ident
            if identity is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(identity), ctypes.py_object(_Stopped)
                )

    def _break(self) -> None:
        self._is_broken = True
        _dismiss(self._inboxes)

    def _close(self) -> None:
        _dismiss(self._inboxes)
        deadline = time.monotonic() + (0.0 if self._is_broken else _STOPPING)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _serve(inbox: _Inbox, threads: int, ready: _Ready) -> None:
    """The main function of a rank's thread."""
    # Both settings belong to the thread. The count is read first, because the first read in a
    # thread sets it to the process's default. Without the second setting, backward on a GPU would
    # run in one thread per device, in which ranks that share the device would wait for each other
    # for ever.
    try:
        torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.autograd.set_multithreading_enabled(False)
    except Exception as error:  # passed to the caller, which waits
        ready.put(error)
        return
    ready.put(None)
    while (task := inbox.get()) is not None:
        task.outcomes.put(task.attempt())
        del task  # an idle rank must not keep objects alive


def _dismiss(inboxes: Sequence[_Inbox]) -> None:
    for inbox in inboxes:
        inbox.put(None)


def _next(outcomes: "queue.SimpleQueue[_Outcome]") -> _Outcome:
    """The next outcome, once there is one."""
    while True:
        # Python runs a signal handler in this thread, between two instructions. A signal that comes
        # just before the wait, or to another thread, does not end the wait.
        with contextlib.suppress(queue.Empty):
            return outcomes.get(timeout=_LONGEST_WAIT)


def _collect_until(
    deadline: float,
    outcomes: "queue.SimpleQueue[_Outcome]",
    outcome_by_rank: dict[int, _Outcome],
    degree: int,
) -> None:
    while len(outcome_by_rank) < degree:
        try:
            outcome = outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return
        outcome_by_rank[outcome.rank] = outcome
