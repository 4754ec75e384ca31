"""Several hosts on one machine: namespaces of the network, joined by a bridge, for tests.

Each host also has its own processes, name and mounts, so that ranks of two hosts cannot share
memory. Everything of a host ends with the process that `Hosts.start` started on it.
"""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

LINK = "eth0"  # of each host
PORT = 29500
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
_OWN = ("--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@functools.cache
def problem() -> str | None:
    """Why hosts cannot be made here; None if they can. It makes two."""
    try:
        with Hosts(2) as hosts:
            ping = hosts.start(0, [sys.executable, "-c", _REACHES, hosts.address(1)])
            if ping.wait(20) != 0:
                return f"the hosts do not reach each other: {ping.output()[-200:]!r}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"namespaces cannot be made: {getattr(error, 'stderr', None) or error}"
    return None


# Nobody listens there: a host that is reached refuses the connection.
_REACHES = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=5)
except ConnectionRefusedError:
    sys.exit(0)
sys.exit("no answer")
"""


class HostProcess:
    """A command on a host, and all processes that it started.

    Args:
        host: its number.
        command: the command.
        namespace: name of the namespace of its network.
        environment: its variables.
    """

    def __init__(
        self, host: int, command: Sequence[str], namespace: str, environment: Mapping[str, str]
    ) -> None:
        self.host = host
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        name = ["sh", "-c", 'hostname "$0" && exec "$@"', f"host{host}"]
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, "unshare", *_OWN, *name, *command],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
        self._namespace = namespace

    def wait(self, seconds: float) -> int | None:
        """The exit code; None if the command still runs after so many seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def output(self) -> str:
        """What was written until now."""
        self._output.seek(0)
        return self._output.read()

    def freeze(self) -> None:
        """Stop all processes of the host, which keep their connections."""
        listed = ["ip", "netns", "pids", self._namespace]
        pids = subprocess.run(listed, check=True, capture_output=True, text=True, timeout=20)
        for pid in map(int, pids.stdout.split()):
            os.kill(pid, signal.SIGSTOP)

    def kill(self) -> None:
        """End all processes of the host at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End them, if they have not ended."""
        self.kill()
        self._output.close()


class Hosts:
    """Some hosts that reach each other; they end with the `with` block.

    Args:
        count: number of hosts.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._id = uuid.uuid4().hex[:8]
        self._stack = ExitStack()

    def __enter__(self) -> "Hosts":
        try:
            switch = self._namespace("switch")
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for host in range(self._count):
                name, port = self._namespace(str(host)), f"port{host}"
                peer = ("type", "veth", "peer", "name", LINK, "netns", name)
                _ip("-n", switch, "link", "add", port, *peer)
                _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
                _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", LINK)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", LINK, "up")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def address(self, host: int) -> str:
        """The address of a host."""
        return f"10.213.0.{host + 1}"

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> HostProcess:
        """Start a command on a host."""
        values = {**os.environ, **(environment or {}), "GLOO_SOCKET_IFNAME": LINK}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            values.pop(name, None)
        process = HostProcess(host, command, self._name(str(host)), values)
        self._stack.callback(process.close)
        return process

    def torchrun(
        self, host: int, ranks: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> HostProcess:
        """Start `torchrun` on a host, with so many ranks, as one of all these hosts."""
        start = [
            *("--nnodes", str(self._count), "--node-rank", str(host)),
            *("--nproc-per-node", str(ranks), "--master-addr", self.address(0)),
            *("--master-port", str(PORT)),
        ]
        return self.start(host, [*TORCHRUN, *start, *command], environment)

    def cut(self, host: int) -> None:
        """Take the link of a host down."""
        _ip("-n", self._name(str(host)), "link", "set", LINK, "down")

    def _name(self, what: str) -> str:
        return f"shardproof-{self._id}-{what}"

    def _namespace(self, what: str) -> str:
        name = self._name(what)
        _ip("netns", "add", name)
        self._stack.callback(_ip, "netns", "delete", name)
        return name


def outcome(processes: Sequence[HostProcess], seconds: float) -> tuple[list[Any], list[str]]:
    """Exit codes and outputs; the code of what still runs after so many seconds is None."""
    deadline = time.monotonic() + seconds
    codes = [each.wait(max(0.0, deadline - time.monotonic())) for each in processes]
    return codes, [each.output() for each in processes]
