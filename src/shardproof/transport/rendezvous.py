"""Where ranks that are threads of one process meet. Python values only; no tensors.

Every meeting is an object of its own, made when the meeting before it was complete. So nothing
that a slow rank still reads is ever overwritten by a fast one, one wait per collective is enough,
and what was handed over is freed as soon as the last rank has read it.

Ranks wait on a condition variable: a rank that spins would keep the interpreter lock from the
ranks it waits for.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

from shardproof.transport.base import Call, PeerError, mismatch, name_ranks


@dataclass
class _Meeting:
    """One collective: who has come, and with what."""

    calls: dict[int, Call] = field(default_factory=dict)
    offers: dict[int, Any] = field(default_factory=dict)
    is_complete: bool = False
    disagrees: bool = False


class Rendezvous:
    """The meeting place of the `size` ranks of one axis; one object, shared by all.

    Args:
        size: number of ranks.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, size: int, *, timeout: float) -> None:
        self.size = size
        self._timeout = timeout
        self._changed = threading.Condition(threading.Lock())
        self._meeting = _Meeting()
        self._left: list[int] = []
        self._failure: tuple[str, int | None] | None = None

    def meet(self, rank: int, call: Call, offer: Any) -> list[Any]:
        """Hand over `offer` and wait for all ranks; what they handed over, in rank order.

        Raises:
            MismatchError: on all ranks, if their calls are not equal.
            PeerError: a rank raised, returned or did not come in time.
        """
        with self._changed:
            meeting = self._meeting
            meeting.calls[rank] = call
            meeting.offers[rank] = offer
            if self._failure is None and self._left:
                self._break_because_left(self._left[0])
            if self._failure is None and len(meeting.calls) == self.size:
                self._complete(meeting)
            elif self._failure is None:
                self._wait(meeting)
            if not meeting.is_complete:
                message, blamed = self._failure or ("the rendezvous was interrupted", None)
                raise PeerError(message, rank=blamed)
        ranks = range(self.size)
        if meeting.disagrees:
            raise mismatch([str(meeting.calls[peer]) for peer in ranks])
        return [meeting.offers[peer] for peer in ranks]

    def leave(self, rank: int) -> None:
        """Rank `rank` has returned: it will not come again."""
        with self._changed:
            self._left.append(rank)
            if self._meeting.calls:
                self._break_because_left(rank)

    def fail(self, rank: int, error: BaseException) -> None:
        """Rank `rank` has raised: whoever waits, or comes later, raises too."""
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        with self._changed:
            self._break(f"rank {rank} of {self.size} raised {what}", rank)

    def interrupt(self, why: str) -> None:
        """End all waiting: nobody will come any more, and no rank is to blame."""
        with self._changed:
            self._break(why, None)

    def _complete(self, meeting: _Meeting) -> None:
        first = meeting.calls[0]
        meeting.disagrees = any(call != first for call in meeting.calls.values())
        meeting.is_complete = True
        self._meeting = _Meeting()
        self._changed.notify_all()

    def _wait(self, meeting: _Meeting) -> None:
        def is_over() -> bool:
            return meeting.is_complete or self._failure is not None

        if not self._changed.wait_for(is_over, self._timeout):
            missing = [rank for rank in range(self.size) if rank not in meeting.calls]
            self._break(
                f"{name_ranks(missing)} of {self.size} did not come within {self._timeout:g} s: "
                f"{_describe(meeting)}",
                missing[0],
            )

    def _break_because_left(self, rank: int) -> None:
        self._break(
            f"rank {rank} of {self.size} returned and will not come: {_describe(self._meeting)}",
            rank,
        )

    def _break(self, message: str, rank: int | None) -> None:
        if self._failure is None:
            self._failure = (message, rank)
            self._changed.notify_all()


def _describe(meeting: _Meeting) -> str:
    """Who waits in what; ranks that wait in the same collective are named together."""
    ranks: dict[str, list[int]] = {}
    for rank, call in sorted(meeting.calls.items()):
        ranks.setdefault(str(call), []).append(rank)
    waits = [
        f"{name_ranks(who)} {'waits' if len(who) == 1 else 'wait'} in {call}"
        for call, who in ranks.items()
    ]
    return "; ".join(waits)
