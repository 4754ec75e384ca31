"""Map memory that the processes of one machine share, and identify these processes.

The memory has no name: rank 0 creates it, the others open it through rank 0's entry in /proc, and
it is freed when the last of them ends, however they end. If the kernel does not support this, it is
a file in /dev/shm that only the owner can read, removed as soon as all have mapped it.
"""

import contextlib
import mmap
import os
import secrets
import select
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shardproof.errors import AxisError
from shardproof.transport.base import Call, Transport

_NONCE = 16
# Errors of a call that the kernel or this Python does not support.
_MISSING = (OSError, AttributeError)


@dataclass(frozen=True)
class Host:
    """The properties that processes must share to share memory, and the id of this process."""

    boot: str
    namespace: str
    layout: int
    pid: int
    began: int
    problem: str | None

    @classmethod
    def here(cls, layout: int, problem: str | None) -> "Host":
        """The properties of this process; `layout` identifies how it would use the memory."""
        if problem is not None or sys.platform != "linux":
            problem = problem or f"memory is shared on Linux alone, and this is {sys.platform}"
            return cls("", "", layout, os.getpid(), 0, problem)
        pid = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
            return cls(boot, namespace, layout, pid, began(pid), None)
        except OSError as error:  # reported to the others, so that they do not wait
            return cls("", "", layout, pid, 0, f"/proc cannot be read ({error})")


class Peer:
    """Another process, of which this one can check whether it still runs.

    Args:
        pid: its process id.
        began_at: its start time, to tell it from a later process with the same id.
    """

    def __init__(self, pid: int, began_at: int) -> None:
        self.pid = pid
        self._began = began_at
        self._poll = select.poll()
        self._closing: Callable[[], object] | None = None
        # An old kernel, a Python built for one, or an ended process; then /proc is used.
        with contextlib.suppress(*_MISSING):
            descriptor = os.pidfd_open(pid)
            self._closing = weakref.finalize(self, os.close, descriptor)
            self._poll.register(descriptor, select.POLLIN)
        if began(pid) != began_at:
            self.close()

    def has_ended(self) -> bool:
        """Whether it has ended; a zombie counts as ended."""
        if self._closing is not None:
            return bool(self._poll.poll(0))
        return began(self.pid) != self._began

    def close(self) -> None:
        """Close the handle."""
        if self._closing is not None:
            self._closing()
            self._closing = None


def began(pid: int) -> int:
    """The start time of a process in clock ticks since boot; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def find_hosts(base: Transport, layout: int, problem: str | None) -> list[Host]:
    """The `Host` of every rank, in rank order.

    Raises:
        AxisError: on all ranks, if they cannot share memory; the message says why.
    """
    hosts: list[Host] = base.gather_objects(Host.here(layout, problem), call=_call("hosts"))
    for rank, host in enumerate(hosts):
        if host.problem is not None:
            raise AxisError(f"rank {rank} of {len(hosts)} cannot share memory: {host.problem}.")
    for what, name in (
        ("boot", "run on different machines"),
        ("namespace", "run in different containers"),
        ("layout", "have different versions of shardproof"),
    ):
        for rank, host in enumerate(hosts):
            if getattr(host, what) != getattr(hosts[0], what):
                raise AxisError(
                    f"ranks 0 and {rank} of {len(hosts)} {name}, and cannot share memory. Use "
                    "transport='gloo'."
                )
    return hosts


def map_together(
    base: Transport, length: int, *, ways: tuple[str, ...] = ("memfd", "file")
) -> mmap.mmap:
    """Map `length` bytes of zeros that all ranks of `base` share.

    Args:
        base: transport by which the ranks exchange the path of the memory.
        length: number of bytes, the same on all ranks.
        ways: ways to create the memory, in the order in which they are tried.

    Raises:
        AxisError: on all ranks, if one of them could not map it; the message says why.
    """
    problems: list[str] = []
    for way in ways:
        memory, problem = _attempt(base, length, way)
        if problem is None and memory is not None:
            return memory
        problems.append(f"{way}: {problem}")
    raise AxisError(f"the ranks cannot share memory. {'; '.join(problems)}.")


def _attempt(base: Transport, length: int, way: str) -> tuple[mmap.mmap | None, str | None]:
    """Let rank 0 create the memory and the others open it; all learn whether all succeeded."""
    memory: mmap.mmap | None = None
    descriptor, problem, path = -1, None, ""
    nonce = secrets.token_bytes(_NONCE)
    try:
        if base.rank == 0:
            descriptor, path = _make(way, length)
            os.pwrite(descriptor, nonce, 0)
    except _MISSING as error:
        problem = f"rank 0: {error}"
    try:
        attempts = base.gather_objects((path, problem, nonce), call=_call(way))
        path, problem, nonce = attempts[0]
        if problem is None:
            try:
                descriptor = descriptor if base.rank == 0 else _open(path, nonce, length)
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                memory = mmap.mmap(descriptor, length, flags=flags)
            except OSError as error:
                problem = f"rank {base.rank}: {error}"
        problems: list[str | None] = base.gather_objects(problem, call=_call(way))
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        if way == "file" and base.rank == 0 and path:
            Path(path).unlink(missing_ok=True)
    if memory is not None and base.rank == 0:
        memory[:_NONCE] = bytes(_NONCE)
    # No rank uses the memory before it is zeroed, or continues while it still has a name.
    base.gather_objects(None, call=_call(way))
    problem = next((each for each in problems if each is not None), None)
    return (memory, None) if problem is None else (None, problem)


def _make(way: str, length: int) -> tuple[int, str]:
    if way == "memfd":
        descriptor = os.memfd_create("shardproof", os.MFD_CLOEXEC)
        os.fchmod(descriptor, 0o600)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    else:
        path = f"/dev/shm/shardproof-{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, length)  # raise for too little memory here, and not later
    except _MISSING:
        os.close(descriptor)
        if way == "file":
            Path(path).unlink()
        raise
    return descriptor, path


def _open(path: str, nonce: bytes, length: int) -> int:
    """Open the memory of rank 0, and check it by the nonce that rank 0 has written there."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(descriptor).st_size != length or os.pread(descriptor, _NONCE, 0) != nonce:
        os.close(descriptor)
        raise OSError(f"{path} is not the memory that rank 0 has made")
    return descriptor


def _call(what: str) -> Call:
    return Call("connect", "setup", f"shared memory, {what}")


def layout_of(core: ModuleType, *numbers: Any) -> int:
    """A number that differs between builds that use the memory differently."""
    return hash((core.area_bytes(2, 0), core.area_bytes(3, 0), core.MAX_RANKS, *numbers))
