"""`Ranks`: base of the engines, whose ranks on this machine serve many calls."""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from shardproof.axis import Axis
from shardproof.engines.interrupt import listening
from shardproof.errors import RankError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Checked options with which ranks are started.

    Attributes:
        degree: number of ranks.
        threads: number of intra-op threads of each rank.
        timeout: seconds that a rank waits for the others in one collective.
        compare_inputs: whether exchanges compare the inputs of layers.
        transport: the requested transport: "auto" or a name.
    """

    degree: int
    threads: int
    timeout: float
    compare_inputs: bool
    transport: str = "auto"


class Ranks(ABC):
    """Ranks that stay between calls. Close them, or use them as a context manager.

    After a failure the ranks are unusable: some have ended, and the others may be anywhere in their
    functions. Every later `run` raises; open new ranks.

    Attributes:
        engine: "threads" or "processes".
        degree: number of ranks.
    """

    engine: str
    degree: int

    def __init__(self, settings: Settings) -> None:
        self.degree = settings.degree
        self._settings = settings
        self._busy = threading.Lock()
        self._owner = os.getpid()
        self._is_closed = False
        self._is_broken = False

    @property
    def is_usable(self) -> bool:
        """Whether the ranks are open and no call on them has failed."""
        return not (self._is_closed or self._is_broken)

    @property
    @abstractmethod
    def transport(self) -> str:
        """The name of the transport between the ranks.

        Raises:
            RankError: the ranks could not connect.
        """

    @property
    def transport_note(self) -> str:
        """Why a faster transport is not used; empty if the fastest one is."""
        return ""

    def run(self, fn: Callable[[Axis], T]) -> list[T]:
        """Call `fn(axis)` on every rank, with a new axis; return the results in rank order.

        Raises:
            ShardproofError: `fn` raised one of shardproof's own errors.
            RankError: a rank raised another error, was killed, left early or did not come; the
                message names the rank and has its traceback.
            UsageError: `fn` or a result cannot be pickled, the ranks are busy, or this process is a
                fork of the one that opened them.
        """
        if not callable(fn):
            raise UsageError(f"cannot run {fn!r} on ranks: it is not callable. Pass fn(axis).")
        if os.getpid() != self._owner:
            raise UsageError(
                f"these {self.degree} ranks belong to process {self._owner}, and this one, "
                f"{os.getpid()}, is a fork of it. Open ranks of its own in a fork: "
                "shardproof.ranks.open_ranks."
            )
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                f"these {self.degree} ranks are busy with another call. Wait for it, or open more "
                "ranks."
            )
        try:
            if not self.is_usable:
                why = "a call on them failed" if self._is_broken else "they were closed"
                raise RankError(
                    f"these {self.degree} ranks cannot run anything more: {why}. Open new ones "
                    "with shardproof.ranks.open_ranks."
                )
            with listening():
                return self._run(fn)
        finally:
            self._busy.release()

    def close(self) -> None:
        """End the ranks and remove their files; closing twice has no effect."""
        if not self._is_closed:
            self._is_closed = True
            if os.getpid() == self._owner:  # a fork does not own the ranks
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _run(self, fn: Callable[[Axis], Any]) -> list[Any]: ...

    @abstractmethod
    def _close(self) -> None: ...
