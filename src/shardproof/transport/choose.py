"""Choose the transport of a process group.

It is shared memory if possible; on several hosts, shared memory inside each and gloo between them;
and otherwise the process group itself. All ranks decide from the
answers of all ranks, so that they decide alike. A fall-back is never silent: the axis and every
report give its reason. If a transport is requested by name and cannot be used, every rank raises.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from shardproof import c_modules
from shardproof.errors import AxisError, MismatchError, UsageError
from shardproof.transport.base import Call, Transport
from shardproof.transport.distributed import DistributedTransport
from shardproof.transport.hosts import HostsTransport
from shardproof.transport.presence import INTERFACE, place_here, remember
from shardproof.transport.shared_memory import SharedTransport
from shardproof.transport.solo import SoloTransport
from shardproof.wording import error_words, short_repr

AUTO, SHM, GLOO, NCCL = "auto", "shm", "gloo", "nccl"
BY_NAME = "asked for by name"  # the note of a choice

# The transports that can be requested for ranks as processes.
NAMES = (AUTO, SHM, GLOO, NCCL)

_CALL = Call("gather", "setup", "the choice of a transport")
_PLACES = Call("gather", "setup", "the places of the ranks")


def meet(backend: str, **options: Any) -> None:
    """`torch.distributed.init_process_group`.

    Args:
        backend: name of the backend of torch.
        options: options of torch.

    Raises:
        AxisError: the ranks cannot meet.
    """
    try:
        dist.init_process_group(backend, **options)
    except (RuntimeError, ValueError) as error:
        interface = os.environ.get(INTERFACE)
        way_out = (
            f"{INTERFACE} is {short_repr(interface)}, and must be the name of a network interface "
            "of this machine: correct it, or unset it."
            if interface
            else "Look at MASTER_ADDR, MASTER_PORT and whether this machine's own name has an "
            f"address; {INTERFACE}=lo keeps ranks of one machine to themselves."
        )
        raise AxisError(
            f"the ranks cannot meet over {backend} ({error_words(error)}). {way_out}"
        ) from error


@dataclass(frozen=True)
class TransportChoice:
    """A transport, and why shared memory is not used.

    Attributes:
        transport: the transport.
        note: the reason, for reports; empty if shared memory is used.
    """

    transport: Transport
    note: str = ""


def checked_transport(transport: Any, names: Sequence[str] = NAMES) -> str:
    """Return the name of a transport that a user requested.

    Raises:
        UsageError: the name is unknown.
    """
    if not isinstance(transport, str) or transport not in names:
        raise UsageError(
            f"unknown transport {short_repr(transport)}. Use one of: {', '.join(names)}."
        )
    return transport


def shm_problem() -> str | None:
    """Why this process cannot share memory with others on this machine, or None; it tries."""
    if c_modules.shm() is None:
        return c_modules.problem()
    try:
        SharedTransport.connect(SoloTransport(), timeout=1.0).close()
    except AxisError as error:
        return str(error).rstrip(".")
    return None


def refusal(why: str, *, option: str = "transport=") -> UsageError:
    """The error for shared memory that was requested by name and cannot be used.

    Args:
        why: the reason.
        option: the option as the user wrote it, up to the value.
    """
    shm, auto = (
        f"{option}{name!r}" if option.endswith("=") else f"{option} {name}" for name in (SHM, AUTO)
    )
    return UsageError(
        f"{shm} cannot be used: {why.rstrip('.')}. Use {auto}, which takes gloo then and says so."
    )


def choose(
    base: DistributedTransport,
    requested: str,
    *,
    timeout: float | None,
    compare_inputs: bool = True,
    observer: Callable[[Call | None], None] | None = None,
) -> TransportChoice:
    """The transport for the ranks of `base`; all of them call this.

    Args:
        base: the process group, which is also the fall-back.
        requested: the requested transport, one of `NAMES`.
        timeout: seconds that a rank waits for the others in one collective; None: torch's default.
        compare_inputs: whether exchanges compare the inputs of layers; the same on all ranks.
        observer: observer of shared memory; see `SharedTransport.connect`.

    Raises:
        MismatchError: the ranks request different transports.
        UsageError: the requested transport cannot be used.
    """
    is_gloo = base.name == GLOO
    if is_gloo:
        _agree(base, requested, compare_inputs)
    if not compare_inputs:
        base.notes = None
    if requested not in ((AUTO, SHM, GLOO) if is_gloo else (AUTO, base.name)):
        raise UsageError(
            f"transport={requested!r} cannot be used: the process group is one of {base.name}. Use "
            "transport='auto', or make another group with torch.distributed.new_group(backend=...)."
        )
    if requested == GLOO or not is_gloo:
        return TransportChoice(base, BY_NAME if is_gloo else "")
    if timeout is None:
        timeout = default_pg_timeout.total_seconds()
    try:
        shared = SharedTransport.connect(base, timeout=timeout, observer=observer)
    except AxisError as error:  # raised on all ranks or on none
        if requested == SHM:
            raise refusal(str(error)) from error
        return _over_hosts(base, error, timeout=timeout, compare_inputs=compare_inputs)
    if not compare_inputs:
        shared.notes = None
    return TransportChoice(shared)


def _over_hosts(
    base: DistributedTransport, problem: AxisError, *, timeout: float, compare_inputs: bool
) -> TransportChoice:
    """Shared memory inside each host if each has several ranks, and otherwise the group itself.

    Args:
        base: the process group.
        problem: why not all ranks share memory.
        timeout: seconds that a rank waits for the others in one collective.
        compare_inputs: whether exchanges compare the inputs of layers.
    """
    try:
        hosts = HostsTransport.connect(base, timeout=timeout)
    except AxisError as error:  # raised on all ranks or on none
        note = f"shared memory is not used: {problem}"
        if len(set(base.hosts)) > 1:
            note += f" Nor is it inside each host: {error}"
        return TransportChoice(base, note)
    if not compare_inputs:
        hosts.notes = None
    return TransportChoice(hosts, "shared memory is used inside each host, and gloo between hosts")


def _agree(base: DistributedTransport, requested: str, compare_inputs: bool) -> None:
    mine = (requested, compare_inputs), socket.gethostname()
    gathered: list[tuple[tuple[str, bool], str]] = base.gather_objects(mine, call=_CALL)
    base.hosts = tuple(host for _, host in gathered)
    everyone = [options for options, _ in gathered]
    if len(set(everyone)) == 1:
        if len(set(base.hosts)) > 1:
            places = base.gather_objects(place_here(base.hosts[base.rank]), call=_PLACES)
            base.places = tuple(places)
            remember(places)
        return
    names = [name for name, _ in everyone]
    if len(set(names)) > 1:
        sides = "; ".join(f"rank {rank}: {each!r}" for rank, each in enumerate(names))
        raise MismatchError(
            f"the ranks ask for different transports. {sides}. Ask for the same on all ranks."
        )
    sides = "; ".join(f"rank {rank}: {each}" for rank, (_, each) in enumerate(everyone))
    raise MismatchError(
        f"the ranks were given different compare_inputs. {sides}. Give the same on all ranks."
    )
