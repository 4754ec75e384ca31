"""All processes of one bench: started when needed, told what to do, ended.

Between orders every process sleeps on its wire. What a host or its ranks print goes to a file,
whose end is shown if one of them fails.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shardproof.bench.jobs import Key
from shardproof.bench.rank import Hello, Order, Trouble
from shardproof.bench.systems.catalog import find_system
from shardproof.engines import interpreter
from shardproof.errors import UsageError
from shardproof.numerics import mode

HOST = ("-m", "shardproof.bench.host")  # what Python is to run
START = 300.0  # seconds; a peer may compile its kernels at its first start
ANSWER = 600.0
LONGEST_PATH = 100  # bytes that the name of a socket may have, nearly
TAIL = 15  # lines of a host's output that are shown

_POLL = 0.2

Environment = Callable[[str], dict[str, str]]


class SystemFailure(Exception):  # noqa: N818 - what happened to a system, not to us
    """A system did not do what it was told; its processes have been ended."""


@dataclass
class _Group:
    """The processes of one key."""

    key: Key
    host: subprocess.Popen[bytes]
    log: Path
    wires: dict[int, Connection] = field(default_factory=dict)
    hello: Hello | None = None


class Fleet:
    """A context manager; leaving it ends all processes.

    Args:
        environment: the variables that a system's processes find, by its name; None: `environment`.
    """

    def __init__(self, environment: Environment | None = None) -> None:
        self._environment = environment
        self.folder = Path(tempfile.mkdtemp(prefix="shardproof-bench-"))  # mode 0700
        # Also where a signal does not leave the time to close.
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._groups: dict[Key, _Group] = {}
        self._failed: dict[Key, str] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        path = self.folder / "wire"
        if len(os.fsencode(path)) > LONGEST_PATH:
            self.close()
            raise UsageError(
                f"the folder for temporary files, {self.folder.parent}, has too long a name for a "
                f"socket in it. Set TMPDIR to a shorter one, for instance TMPDIR=/tmp."
            )
        self._listener.bind(str(path))
        self._listener.listen(64)

    def start(self, keys: Iterable[Key]) -> None:
        """Start what does not run yet, all at once; what fails is known to `ask`."""
        new = [key for key in keys if key not in self._groups and key not in self._failed]
        for key in new:
            self._groups[key] = self._spawn(key)
        self._meet(new)

    def hello(self, key: Key) -> Hello:
        """What a group runs on.

        Raises:
            SystemFailure: it could not be started.
        """
        group = self._running(key)
        if group.hello is None:
            raise SystemFailure("its ranks did not come")
        return group.hello

    def ask(self, key: Key, order: Order) -> list[Any]:
        """Give an order to all ranks of a group; their answers, in rank order.

        Raises:
            SystemFailure: it could not be started, a rank raised or left, or none answered.
        """
        group = self._running(key)
        for rank, wire in group.wires.items():
            try:
                wire.send(order)
            except OSError:  # it has left since its last answer
                raise self._fail(group, f"rank {rank} of {key.ranks} left") from None
        return self._answers(group, time.monotonic() + ANSWER)

    def is_running(self, key: Key) -> bool:
        """True until a group is ended or fails."""
        return key in self._groups

    def end(self, keys: Iterable[Key]) -> None:
        """End groups; one that does not run is fine."""
        groups = [self._groups.pop(key) for key in set(keys) if key in self._groups]
        for group in groups:  # all at once: each takes its time to leave
            for wire in group.wires.values():
                wire.close()  # what the ranks wait for
        for group in groups:
            try:
                group.host.wait(10.0)
            except subprocess.TimeoutExpired:
                _kill(group.host)

    def close(self) -> None:
        """End everything."""
        self.end(self._groups)
        self._listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _running(self, key: Key) -> _Group:
        if key in self._failed:
            raise SystemFailure(self._failed[key])
        return self._groups[key]

    def _spawn(self, key: Key) -> _Group:
        log = self.folder / f"{key.system}-{key.ranks}.log"
        arguments = [key.system, str(key.ranks), str(self.folder / "wire")]
        with log.open("wb") as out:
            host = subprocess.Popen(
                [sys.executable, *_flags(), *HOST, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=(self._environment or environment)(key.system),
                start_new_session=True,  # Ctrl-C is for the bench, which ends them in order
            )
        return _Group(key, host, log)

    def _meet(self, keys: Sequence[Key]) -> None:
        """Wait until all ranks of the new groups have come, or their hosts are gone."""
        deadline = time.monotonic() + START
        pending = set(keys)
        self._listener.settimeout(_POLL)
        while pending:
            with contextlib.suppress(TimeoutError):  # nobody came: look at those who are awaited
                end, _ = self._listener.accept()
                self._welcome(Connection(end.detach()))
            for key in list(pending):
                group = self._groups[key]
                if len(group.wires) == key.ranks:
                    pending.discard(key)
                    self._greet(group, deadline)
                elif group.host.poll() is not None:
                    pending.discard(key)
                    self._fail(group, f"its process ended with exit code {group.host.returncode}")
                elif time.monotonic() > deadline:
                    pending.discard(key)
                    self._fail(group, f"its ranks did not come within {START:g} s")

    def _welcome(self, wire: Connection) -> None:
        """Take in a rank; one that has left, or whose group has failed meanwhile, is let go."""
        try:
            system, ranks, rank = wire.recv()
        except (EOFError, OSError):  # its group is missed, and is given up when its host ends
            wire.close()
            return
        group = self._groups.get(Key(system, ranks))
        if group is None:
            wire.close()
        else:
            group.wires[rank] = wire

    def _greet(self, group: _Group, deadline: float) -> None:
        try:
            group.hello = self._answers(group, deadline)[0]
        except SystemFailure:
            return  # remembered, and told to whoever asks

    def _answers(self, group: _Group, deadline: float) -> list[Any]:
        """One answer of each rank.

        A rank that raises leaves the others in a collective, so the first trouble ends the group.
        """
        answers: dict[int, Any] = {}
        while len(answers) < len(group.wires):
            waiting = {wire: rank for rank, wire in group.wires.items() if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._fail(group, "it did not answer in time")
            for wire in ready:
                if not isinstance(wire, Connection):
                    continue
                rank = waiting[wire]
                try:
                    answers[rank] = wire.recv()
                except (EOFError, OSError):
                    raise self._fail(group, f"rank {rank} of {group.key.ranks} left") from None
                if isinstance(answers[rank], Trouble):
                    summary = f"rank {rank} of {group.key.ranks} raised {answers[rank].summary}"
                    raise self._fail(group, summary, answers[rank].trace)
        return [answers[rank] for rank in sorted(answers)]

    def _fail(self, group: _Group, why: str, detail: str = "") -> SystemFailure:
        """End a group that cannot go on, and remember why."""
        _kill(group.host)
        for wire in group.wires.values():
            wire.close()
        del self._groups[group.key]
        if not detail:
            lines = group.log.read_text(errors="replace").splitlines()
            detail = "\n".join(lines[-TAIL:])
        self._failed[group.key] = f"{why}\n{detail}".rstrip()
        return SystemFailure(self._failed[group.key])


def environment(system: str) -> dict[str, str]:
    """What a host finds: this process's variables, and the BLAS mode and threads of its system.

    Strict BLAS is for invariant numerics alone; everybody else gets the library as it comes.
    """
    found = find_system(system)
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in _NOT_INHERITED
        and not (sys.flags.ignore_environment and key.startswith("PYTHON"))
    }
    blas = inherited.get(mode.VARIABLE, "auto") if found.is_invariant else "off"
    programs = str(Path(sys.executable).parent)  # a peer looks there for what compiles its kernels
    return inherited | {
        mode.VARIABLE: blas,
        "PATH": os.pathsep.join(filter(None, [programs, inherited.get("PATH")])),
        "OMP_NUM_THREADS": str(found.threads),
        "PYTHONPATH": os.pathsep.join(interpreter.search_path()),
    }


# The strict mode of a shell, threads of a library below torch's, and torchrun's ranks.
_NOT_INHERITED = (
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def _flags() -> list[str]:
    """This interpreter's flags. -I and -E are left out: a host finds its modules by PYTHONPATH."""
    found = interpreter.flags()
    if "-I" in found:
        found += ["-s", "-P"]
    return [flag for flag in found if flag not in ("-I", "-E")]


def _kill(host: subprocess.Popen[bytes]) -> None:
    """End a host and what is in its session; ranks that are processes end when it is gone."""
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(host.pid, signal.SIGKILL)
    host.wait()
