"""Which transport serves a process group, and why.

Shared memory where it can, the process group itself where it cannot. All ranks decide from what
all ranks say, so that they decide alike. A fall-back is never silent: its reason goes with the
axis and into every report. Asked for by name, what cannot be had is an error on every rank.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardproof import core
from shardproof.errors import MismatchError, UsageError
from shardproof.transport.base import Call, Transport, name_ranks
from shardproof.transport.distributed import DistributedTransport

AUTO, SHM, GLOO, NCCL = "auto", "shm", "gloo", "nccl"

# What can be asked for where ranks are processes.
NAMES = (AUTO, SHM, GLOO, NCCL)

_CALL = Call("gather", "setup", "the choice of a transport")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Choice:
    """A transport and why it is not shared memory.

    Attributes:
        transport: to use.
        note: for reports; empty if there is nothing to say.
    """

    transport: Transport
    note: str = ""


@dataclass(frozen=True)
class _Said:
    """What one rank says before all decide."""

    asked: str
    host: str
    machine: str
    problem: str | None


def checked_transport(transport: Any, known: Sequence[str] = NAMES) -> str:
    """A name of a transport as a user gave it.

    Raises:
        UsageError: it is none of those known.
    """
    if not isinstance(transport, str) or transport not in known:
        raise UsageError(f"unknown transport {transport!r}. Use one of: {', '.join(known)}.")
    return transport


def shm_problem() -> str | None:
    """Why this process cannot share memory with others, or None."""
    return core.problem() or "processes do not share memory yet"


def refusal(why: str) -> UsageError:
    """The error for shared memory that was asked for by name and cannot be had."""
    return UsageError(
        f"transport='shm' cannot be used: {why}. Remove the reason, or use transport='auto', "
        "which takes gloo then and says so."
    )


def choose(base: DistributedTransport, asked: str, *, timeout: float | None) -> Choice:
    """The transport for the ranks of `base`; all of them call this.

    Args:
        base: the process group, which is also the fall-back.
        asked: one of `NAMES`.
        timeout: seconds that a rank waits for the others in one collective; None leaves it to the
            transport.

    Raises:
        MismatchError: the ranks ask for different transports.
        UsageError: what was asked for cannot be had.
    """
    if base.name != GLOO:
        if asked in (AUTO, base.name):
            return Choice(base)
        raise UsageError(
            f"transport={asked!r} cannot be used: the process group is one of {base.name}. Use "
            "transport='auto', or make a group of gloo."
        )
    said: list[_Said] = base.gather_objects(_here(asked), call=_CALL)
    _check_asked(said)
    if asked == NCCL:
        raise UsageError(
            "transport='nccl' cannot be used: the process group is one of gloo. Use "
            "transport='auto', or initialise torch.distributed with nccl."
        )
    if asked == GLOO:
        return Choice(base, "gloo was asked for by name")
    why = _why_not(said)
    if why is not None and asked == SHM:
        raise refusal(why)
    return Choice(base, f"shared memory is not used: {why}")


def _here(asked: str) -> _Said:
    # A name may be that of many hosts, and containers of one machine may share no memory: the
    # boot tells hosts apart, and the mapping shows the rest.
    machine = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else platform.node()
    return _Said(asked, platform.node(), machine, shm_problem())


def _check_asked(said: Sequence[_Said]) -> None:
    if len({each.asked for each in said}) > 1:
        sides = "; ".join(f"rank {rank}: {each.asked!r}" for rank, each in enumerate(said))
        raise MismatchError(
            f"the ranks ask for different transports. {sides}. Ask for the same on all ranks."
        )


def _why_not(said: Sequence[_Said]) -> str | None:
    """What keeps these ranks from sharing memory, as all of them see it."""
    if len({each.machine for each in said}) > 1:
        ranks: dict[tuple[str, str], list[int]] = {}
        for rank, each in enumerate(said):
            ranks.setdefault((each.machine, each.host), []).append(rank)
        where = "; ".join(f"{host}: {name_ranks(who)}" for (_, host), who in ranks.items())
        return f"the ranks are on {len(ranks)} machines ({where})"
    for rank, each in enumerate(said):
        if each.problem is not None:
            return f"rank {rank} cannot: {each.problem}"
    return None
