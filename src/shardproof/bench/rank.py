"""One rank of one system: it connects to the bench, does what it is told, and says what came of it.

Between orders it sleeps on the wire. In the timed loop there is the step and a look at the clock.
"""

import functools
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from shardproof.axis import Axis
from shardproof.bench import proof
from shardproof.bench.system import Party, System
from shardproof.bench.systems.catalog import find_system
from shardproof.bench.systems.ours import Ours
from shardproof.bench.work import Evidence, Trial
from shardproof.bench.works.catalog import find_work
from shardproof.errors import UsageError
from shardproof.numerics import mode
from shardproof.prover.case import as_it_lies
from shardproof.prover.hashing import hash_tensor


@dataclass(frozen=True)
class Hello:
    """What a rank runs on.

    Attributes:
        transport: what carries its bytes in truth; None without ranks.
        contract: what its bits depend on; None for others than ours.
    """

    transport: str | None
    contract: str | None


@dataclass(frozen=True)
class Prepare:
    """Make the trial of a variant, and show that it is right.

    Attributes:
        work: name.
        variant: place among the work's variants.
        folder: of the yardstick's tensors.
        keeps: True for the yardstick, which writes them.
    """

    work: str
    variant: int
    folder: Path
    keeps: bool


@dataclass(frozen=True)
class Prepared:
    """What a rank's first step gave.

    Attributes:
        findings: what is wrong; empty if nothing.
        hashes: name of a tensor -> SHA-256 of the whole; of invariant systems alone.
        figures: what was counted.
    """

    findings: tuple[proof.Finding, ...]
    hashes: dict[str, str]
    figures: dict[str, float]


@dataclass(frozen=True)
class Time:
    """Run the trial; the answer is the stamps.

    Attributes:
        warm_up, steps: how often.
    """

    warm_up: int
    steps: int


@dataclass(frozen=True)
class Drop:
    """Let go of the trial and its memory."""


@dataclass(frozen=True)
class Trouble:
    """What an order raised.

    Attributes:
        summary: one line.
        trace: the traceback.
    """

    summary: str
    trace: str


Order = Prepare | Time | Drop


def serve(axis: Axis | None, *, system: str, ranks: int, wire: Path) -> None:
    """Do what the bench says until it hangs up.

    Args:
        axis: the ranks; None without.
        system: which this is a rank of.
        ranks: how many there are.
        wire: the socket at which the bench listens.
    """
    desk = Desk(find_system(system), axis)
    with _connect(wire) as connection:
        connection.send((system, ranks, desk.rank))
        connection.send(_attempt(desk.join))
        while True:
            try:
                order = connection.recv()
            except EOFError:
                return
            connection.send(_attempt(functools.partial(desk.obey, order)))


def _connect(wire: Path) -> Connection:
    end = socket.socket(socket.AF_UNIX)
    end.connect(str(wire))
    return Connection(end.detach())


def _attempt(act: Callable[[], object]) -> object:
    try:
        return act()
    except Exception as error:
        return Trouble(f"{type(error).__name__}: {error}", traceback.format_exc())


class Desk:
    """What a rank has at hand between two orders.

    Args:
        system: which this is a rank of.
        axis: the ranks; None without.
    """

    def __init__(self, system: System, axis: Axis | None) -> None:
        self.rank = 0 if axis is None else axis.rank
        self._system = system
        self._axis = axis
        self._party: Party | None = None
        self._trial: Trial | None = None

    def join(self) -> Hello:
        """Become a rank of the system."""
        party = self._party = self._system.join(self._axis)
        transport = None if self._axis is None else party.wire or self._axis.transport.name
        contract = mode.contract(party.scheme) if isinstance(party, Ours) else None
        return Hello(transport, contract)

    def obey(self, order: Order) -> object:
        """Carry out one order; the answer to send."""
        if self._party is None:
            raise UsageError(f"{self._system.name} gets an order and has not joined")
        if isinstance(order, Prepare):
            return self._prepare(self._party, order)
        if isinstance(order, Drop):
            self._trial = None
            return None
        if self._trial is None:
            raise UsageError(f"{self._system.name} is to be timed and has prepared nothing")
        return stamps(self._trial.step, order)

    def _prepare(self, party: Party, order: Prepare) -> Prepared:
        trial = find_work(order.work).variants[order.variant].make(party)
        shown = [
            replace(each, tensor=as_it_lies(each.tensor, each.layout)) for each in trial.evidence()
        ]
        if order.keeps:
            proof.keep([each for each in shown if each.expected is None], order.folder)
        wrong = proof.findings(shown, proof.kept(order.folder))
        self._trial = trial
        return Prepared(tuple(wrong), hashes(party, shown), trial.figures())


def hashes(party: Party, shown: list[Evidence]) -> dict[str, str]:
    """Of the whole tensors; those of cut ones are known to rank 0 alone."""
    if not (isinstance(party, Ours) and party.scheme.is_invariant):
        return {}
    found = {
        each.name: hash_tensor(each.tensor, each.layout, party.axis, who=each.name)
        for each in shown
    }
    return {name: sha for name, sha in found.items() if sha is not None}


def stamps(step: Callable[[], object], order: Time) -> list[int]:
    """Nanoseconds on the clock of the machine at the end of the warm-up and of every step."""
    clock = time.monotonic_ns
    for _ in range(order.warm_up):
        step()
    found = [clock()]
    for _ in range(order.steps):
        step()
        found.append(clock())
    return found
