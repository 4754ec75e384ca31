"""`Rendezvous`: synchronises ranks as threads of one process. Python values only; no tensors.

Each meeting is a new object, which is created when the previous meeting is complete. So a fast rank
never overwrites values that a slow rank still reads, one wait per collective is enough, and values
are freed as soon as the last rank has read them.

With the C core, ranks wait in it without the interpreter lock. Sums use the same counters, so that
ranks in different collectives meet and find that their calls differ. Without the core, ranks wait
on a condition variable, because a rank that spins in Python would keep the interpreter lock from
the ranks that it waits for.
"""

import functools
import mmap
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardproof import c_modules
from shardproof.error_text import text_of
from shardproof.errors import UsageError
from shardproof.transport.agreement import disagreement
from shardproof.transport.base import BUSY, Call, PeerError, Transport, name_ranks, name_waits
from shardproof.transport.notes import NOTHING, CallNotes

# The call by which ranks exchange their descriptions after a mismatch.
_CONFER = Call("confer", "setup", "")


@dataclass
class _Meeting:
    """One collective: the ranks that have come, and their values."""

    calls: dict[int, Call] = field(default_factory=dict)
    note_hashes: dict[int, int] = field(default_factory=dict)
    offers: dict[int, Any] = field(default_factory=dict)
    is_complete: bool = False
    disagrees: bool = False
    readers: int = 0


# The core calls back every 20 ms. A longer gap means that the interpreter lock was held.
_LONGEST_STEP = 0.25


class _Patience:
    """The time that one rank has waited in one collective while the others could have come.

    A rank that holds the interpreter lock (in a long call into C) keeps all others from coming.
    That time is not counted.
    """

    def __init__(self) -> None:
        self._collective = -1
        self._last_wait = 0.0
        self._counted = 0.0

    def count(self, collective: int, waited: float) -> float:
        """The seconds that count, of the `waited` seconds of this wait."""
        if collective != self._collective:
            self._collective, self._last_wait, self._counted = collective, 0.0, 0.0
        step = (
            waited - self._last_wait if waited >= self._last_wait else waited
        )  # otherwise a further wait in the same collective
        self._counted += min(step, _LONGEST_STEP)
        self._last_wait = waited
        return self._counted


class Rendezvous:
    """Synchronises the `size` ranks of one axis, which share one object.

    Args:
        size: number of ranks.
        timeout: seconds that a rank waits for the others.
        parent: the rendezvous of which these ranks are some, or None.
        ranks: their numbers in the launch, for messages; by default 0, 1, ...

    Attributes:
        cores: each rank's handle of the C core, or None without the core.
        calls: the last call of each rank, if it used the core.
    """

    def __init__(
        self,
        size: int,
        *,
        timeout: float,
        parent: "Rendezvous | None" = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.size = size
        self.timeout = timeout
        self._ranks = range(size) if ranks is None else ranks
        self._num_ranks: int = size if parent is None else parent._num_ranks
        self._children: list[Rendezvous] = []
        self._transports: list[Transport] = []
        self._changed = threading.Condition(threading.Lock())
        self._meeting = _Meeting()
        self._left: list[int] = []
        self._failure: tuple[str, int | None] | None = None
        self._meetings: dict[int, _Meeting] = {}
        self.calls: list[Call | None] = [None] * size
        self._patience = [_Patience() for _ in range(size)]
        self.cores: list[Any] | None = None
        module = c_modules.shm()
        if module is not None and 1 < size <= module.MAX_RANKS:
            area = mmap.mmap(-1, module.area_bytes(size, 0))
            self._disagreement: type[BaseException] = module.Disagreement
            self.cores = [
                module.Core(area, rank, size, 0, functools.partial(self._tick, rank))
                for rank in range(size)
            ]

    def meet(self, rank: int, call: Call, offer: Any, call_notes: CallNotes = NOTHING) -> list[Any]:
        """Pass `offer` and wait for all ranks; return the offers of all ranks, in rank order.

        Raises:
            MismatchError: on all ranks, if their calls or their notes differ.
            UsageError: this rank is in a meeting already, in another thread.
            PeerError: a rank raised, returned or did not come in time.
        """
        if self.cores is not None:
            return self._meet_in_core(self.cores[rank], rank, call, offer, call_notes)
        with self._changed:
            meeting = self._meeting
            if self._failure is None and rank in meeting.calls:
                raise UsageError(f"{call} on rank {rank} of {self.size}: {BUSY}.")
            meeting.calls[rank] = call
            meeting.note_hashes[rank] = call_notes.value
            meeting.offers[rank] = offer
            if self._failure is None and self._left:
                self._break_because_left(self._left[0], meeting.calls)
            if self._failure is None and len(meeting.calls) == self.size:
                self._complete(meeting)
            elif self._failure is None:
                self._wait(meeting)
            if not meeting.is_complete:
                message, blamed_rank = self._failure or ("the rendezvous was interrupted", None)
                raise PeerError(message, rank=blamed_rank)
        ranks = range(self.size)
        if meeting.disagrees:
            confer = functools.partial(self.meet, rank, _CONFER)
            raise disagreement(str(call), call_notes, confer)
        return [meeting.offers[peer] for peer in ranks]

    def part(self, ranks: Sequence[int]) -> "Rendezvous":
        """A rendezvous of some of the ranks, which fails when this one does."""
        part = Rendezvous(
            len(ranks),
            timeout=self.timeout,
            parent=self,
            ranks=[self._ranks[rank] for rank in ranks],
        )
        with self._changed:
            self._children.append(part)
            failure = self._failure
        if failure is not None:
            part._end(*failure)
        return part

    def attach(self, transport: Transport) -> None:
        """Note a transport over this rendezvous, for `transports`."""
        with self._changed:
            self._transports.append(transport)

    def transports(self) -> list[Transport]:
        """The transports that were attached, here and to the parts."""
        with self._changed:
            mine, children = list(self._transports), list(self._children)
        return [*mine, *(each for child in children for each in child.transports())]

    def leave(self, rank: int) -> None:
        """Rank `rank` has returned and will not come again."""
        with self._changed:
            self._left.append(rank)
            if self._meeting.calls:
                self._break_because_left(rank, self._meeting.calls)
            children = list(self._children)
        if self.cores is not None:
            self.cores[rank].ring()  # ranks that wait for this one notice that it has left
        number = self._ranks[rank]
        for child in children:
            if number in child._ranks:
                child.leave(child._ranks.index(number))

    def fail(self, rank: int, error: BaseException) -> None:
        """Rank `rank` has raised; all ranks that wait or come later raise too."""
        if issubclass(type(error), PeerError):  # of a part, whose other ranks may not know of it
            self._end(str(error), getattr(error, "rank", None))
            return
        number = self._ranks[rank]
        self._end(f"rank {number} of {self._num_ranks} raised {text_of(error)}", number)

    def interrupt(self, why: str) -> None:
        """End all waiting, because the call was interrupted by no fault of a rank."""
        self._end(why, None)

    def _end(self, message: str, rank: int | None) -> None:
        with self._changed:
            self._break(message, rank)
            children = list(self._children)
        for child in children:
            child._end(message, rank)

    def _complete(self, meeting: _Meeting) -> None:
        calls_and_notes = [
            (meeting.calls[rank], meeting.note_hashes[rank]) for rank in range(self.size)
        ]
        meeting.disagrees = any(each != calls_and_notes[0] for each in calls_and_notes)
        meeting.is_complete = True
        self._meeting = _Meeting()
        self._changed.notify_all()

    def _wait(self, meeting: _Meeting) -> None:
        def is_over() -> bool:
            return meeting.is_complete or self._failure is not None

        patience, start = _Patience(), time.monotonic()
        while not self._changed.wait_for(is_over, min(self.timeout, _LONGEST_STEP)):
            if patience.count(0, time.monotonic() - start) < self.timeout:
                continue
            missing = [rank for rank in range(self.size) if rank not in meeting.calls]
            self._break_because_late(missing, meeting.calls)

    def _meet_in_core(
        self, end: Any, rank: int, call: Call, offer: Any, call_notes: CallNotes
    ) -> list[Any]:
        number = (
            end.calls
        )  # every collective is counted, so that all ranks have the same number here
        meeting = self._meetings.setdefault(number, _Meeting())
        meeting.offers[rank] = offer
        self.calls[rank] = call
        if call_notes.value:
            end.noted = call_notes.value
        try:
            end.meet(call.digest)
        except self._disagreement:
            self._meetings.pop(number, None)
            raise disagreement(str(call), call_notes, functools.partial(_confer, end)) from None
        offers = [meeting.offers[peer] for peer in range(self.size)]
        with self._changed:
            meeting.readers += 1
            if meeting.readers == self.size:
                del self._meetings[number]
        return offers

    def _tick(self, rank: int, waited: float, missing: list[int]) -> None:
        """Called by the core while `rank` waits; raise if the missing ranks will not come."""
        collective = 0 if self.cores is None else self.cores[rank].calls
        counted = self._patience[rank].count(collective, waited)
        with self._changed:
            if self._failure is None:
                waiting = {
                    peer: call
                    for peer, call in enumerate(self.calls)
                    if peer not in missing and call is not None
                }
                left_ranks = [peer for peer in self._left if peer in missing]
                if left_ranks:
                    self._break_because_left(left_ranks[0], waiting)
                elif missing and counted >= self.timeout:
                    self._break_because_late(missing, waiting)
            if self._failure is not None:
                message, blamed_rank = self._failure
                raise PeerError(message, rank=blamed_rank)

    def _break_because_left(self, rank: int, waiting: Mapping[int, Call]) -> None:
        number = self._ranks[rank]
        self._break(
            f"rank {number} of {self._num_ranks} returned and will not come: "
            f"{self._name_waits(waiting)}",
            number,
        )

    def _break_because_late(self, missing: list[int], waiting: Mapping[int, Call]) -> None:
        numbers = [self._ranks[rank] for rank in missing]
        self._break(
            f"{name_ranks(numbers)} of {self._num_ranks} did not come within {self.timeout:g} s: "
            f"{self._name_waits(waiting)}",
            numbers[0],
        )

    def _name_waits(self, waiting: Mapping[int, Call]) -> str:
        return name_waits({self._ranks[rank]: call for rank, call in waiting.items()})

    def _break(self, message: str, rank: int | None) -> None:
        if self._failure is None:
            self._failure = (message, rank)
            self._changed.notify_all()
            if self.cores is not None:
                self.cores[0].break_off(b"")


def _confer(end: Any, text: str) -> list[str]:
    return list(end.confer(text.encode()))
