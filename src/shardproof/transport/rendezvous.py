"""Where ranks that are threads of one process meet. Python values only; no tensors.

Every meeting is an object of its own, made when the meeting before it was complete. So nothing
that a slow rank still reads is ever overwritten by a fast one, one wait per collective is enough,
and what was handed over is freed as soon as the last rank has read it.

Where the C core was built, ranks wait in it, without the interpreter lock, and sums use the same
counters, so that ranks that are in different collectives meet and see that they disagree. Else
they wait on a condition variable: a rank that spins in Python would keep the interpreter lock from
the ranks it waits for.
"""

import functools
import mmap
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardproof import core
from shardproof.error_text import text_of
from shardproof.errors import UsageError
from shardproof.transport.agreement import disagreement
from shardproof.transport.base import BUSY, Call, PeerError, name_ranks, name_waits
from shardproof.transport.notes import NOTHING, Noted

# How ranks that disagree tell each other what they meant.
_CONFER = Call("confer", "setup", "")


@dataclass
class _Meeting:
    """One collective: who has come, and with what."""

    calls: dict[int, Call] = field(default_factory=dict)
    noted: dict[int, int] = field(default_factory=dict)
    offers: dict[int, Any] = field(default_factory=dict)
    is_complete: bool = False
    disagrees: bool = False
    readers: int = 0


# The core asks every 20 ms. Where it could not, somebody held the interpreter lock.
_LONGEST_STEP = 0.25


class _Patience:
    """How long one rank has waited in one collective while the others could have come.

    A rank that holds the interpreter lock (a long call into C) keeps all others from coming. That
    time is nobody's fault who is missing, and is not counted.
    """

    def __init__(self) -> None:
        self._collective = -1
        self._seen = 0.0
        self._counted = 0.0

    def count(self, collective: int, waited: float) -> float:
        """Seconds to be counted, of the `waited` that have passed in this wait."""
        if collective != self._collective:
            self._collective, self._seen, self._counted = collective, 0.0, 0.0
        step = waited - self._seen if waited >= self._seen else waited  # else a further wait of it
        self._counted += min(step, _LONGEST_STEP)
        self._seen = waited
        return self._counted


class Rendezvous:
    """The meeting place of the `size` ranks of one axis; one object, shared by all.

    Args:
        size: number of ranks.
        timeout: seconds that a rank waits for the others.

    Attributes:
        cores: each rank's end of the C core, or None where that is missing.
        calls: what each rank was last in, if it went there by its core.
    """

    def __init__(self, size: int, *, timeout: float) -> None:
        self.size = size
        self._timeout = timeout
        self._changed = threading.Condition(threading.Lock())
        self._meeting = _Meeting()
        self._left: list[int] = []
        self._failure: tuple[str, int | None] | None = None
        self._meetings: dict[int, _Meeting] = {}
        self.calls: list[Call | None] = [None] * size
        self._patience = [_Patience() for _ in range(size)]
        self.cores: list[Any] | None = None
        module = core.shm()
        if module is not None and 1 < size <= module.MAX_RANKS:
            area = mmap.mmap(-1, module.area_bytes(size, 0))
            self._disagreement: type[BaseException] = module.Disagreement
            self.cores = [
                module.Core(area, rank, size, 0, functools.partial(self._tick, rank))
                for rank in range(size)
            ]

    def meet(self, rank: int, call: Call, offer: Any, noted: Noted = NOTHING) -> list[Any]:
        """Hand over `offer` and wait for all ranks; what they handed over, in rank order.

        Raises:
            MismatchError: on all ranks, if their calls, or what they noted, are not equal.
            UsageError: this rank is in a meeting already, by another thread of it.
            PeerError: a rank raised, returned or did not come in time.
        """
        if self.cores is not None:
            return self._meet_in_core(self.cores[rank], rank, call, offer, noted)
        with self._changed:
            meeting = self._meeting
            if self._failure is None and rank in meeting.calls:
                raise UsageError(f"{call} on rank {rank} of {self.size}: {BUSY}.")
            meeting.calls[rank] = call
            meeting.noted[rank] = noted.value
            meeting.offers[rank] = offer
            if self._failure is None and self._left:
                self._break_because_left(self._left[0], meeting.calls)
            if self._failure is None and len(meeting.calls) == self.size:
                self._complete(meeting)
            elif self._failure is None:
                self._wait(meeting)
            if not meeting.is_complete:
                message, blamed = self._failure or ("the rendezvous was interrupted", None)
                raise PeerError(message, rank=blamed)
        ranks = range(self.size)
        if meeting.disagrees:
            confer = functools.partial(self.meet, rank, _CONFER)
            raise disagreement(str(call), noted, confer)
        return [meeting.offers[peer] for peer in ranks]

    def leave(self, rank: int) -> None:
        """Rank `rank` has returned: it will not come again."""
        with self._changed:
            self._left.append(rank)
            if self._meeting.calls:
                self._break_because_left(rank, self._meeting.calls)
        if self.cores is not None:
            self.cores[rank].ring()  # who waits for this rank finds that it has left

    def fail(self, rank: int, error: BaseException) -> None:
        """Rank `rank` has raised: whoever waits, or comes later, raises too."""
        what = text_of(error)
        with self._changed:
            self._break(f"rank {rank} of {self.size} raised {what}", rank)

    def interrupt(self, why: str) -> None:
        """End all waiting: nobody will come any more, and no rank is to blame."""
        with self._changed:
            self._break(why, None)

    def _complete(self, meeting: _Meeting) -> None:
        noted_calls = [(meeting.calls[rank], meeting.noted[rank]) for rank in range(self.size)]
        meeting.disagrees = any(each != noted_calls[0] for each in noted_calls)
        meeting.is_complete = True
        self._meeting = _Meeting()
        self._changed.notify_all()

    def _wait(self, meeting: _Meeting) -> None:
        def is_over() -> bool:
            return meeting.is_complete or self._failure is not None

        patience, begun = _Patience(), time.monotonic()
        while not self._changed.wait_for(is_over, min(self._timeout, _LONGEST_STEP)):
            if patience.count(0, time.monotonic() - begun) < self._timeout:
                continue
            missing = [rank for rank in range(self.size) if rank not in meeting.calls]
            self._break_because_late(missing, meeting.calls)

    def _meet_in_core(self, end: Any, rank: int, call: Call, offer: Any, noted: Noted) -> list[Any]:
        number = end.calls  # every collective counts, so that all ranks have the same number here
        meeting = self._meetings.setdefault(number, _Meeting())
        meeting.offers[rank] = offer
        self.calls[rank] = call
        if noted.value:
            end.noted = noted.value
        try:
            end.meet(call.digest)
        except self._disagreement:
            self._meetings.pop(number, None)
            raise disagreement(str(call), noted, functools.partial(_confer, end)) from None
        offers = [meeting.offers[peer] for peer in range(self.size)]
        with self._changed:
            meeting.readers += 1
            if meeting.readers == self.size:
                del self._meetings[number]
        return offers

    def _tick(self, rank: int, waited: float, missing: list[int]) -> None:
        """Called by the core while `rank` waits for the missing: raise if they will not come."""
        collective = 0 if self.cores is None else self.cores[rank].calls
        counted = self._patience[rank].count(collective, waited)
        with self._changed:
            if self._failure is None:
                waiting = {
                    peer: call
                    for peer, call in enumerate(self.calls)
                    if peer not in missing and call is not None
                }
                gone = [peer for peer in self._left if peer in missing]
                if gone:
                    self._break_because_left(gone[0], waiting)
                elif missing and counted >= self._timeout:
                    self._break_because_late(missing, waiting)
            if self._failure is not None:
                message, blamed = self._failure
                raise PeerError(message, rank=blamed)

    def _break_because_left(self, rank: int, waiting: Mapping[int, Call]) -> None:
        self._break(
            f"rank {rank} of {self.size} returned and will not come: {name_waits(waiting)}", rank
        )

    def _break_because_late(self, missing: list[int], waiting: Mapping[int, Call]) -> None:
        self._break(
            f"{name_ranks(missing)} of {self.size} did not come within {self._timeout:g} s: "
            f"{name_waits(waiting)}",
            missing[0],
        )

    def _break(self, message: str, rank: int | None) -> None:
        if self._failure is None:
            self._failure = (message, rank)
            self._changed.notify_all()
            if self.cores is not None:
                self.cores[0].break_off(b"")


def _confer(end: Any, text: str) -> list[str]:
    return list(end.confer(text.encode()))
