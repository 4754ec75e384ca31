"""Commands of Python in processes that need not import torch again.

`run([sys.executable, "-m", "shardproof", "doctor"], cwd=folder)` is `subprocess.run` with its
output captured as text. The process is a real one: it has its own exit code, signals, session,
directory, environment and standard streams. But it is a fork of an interpreter that has imported
torch, transformers and shardproof, so it starts in milliseconds. Use `subprocess` to test what
happens while these are imported, and to give options of Python other than -W, -m and -c.
"""

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from warm_server import READY

SERVER = Path(__file__).with_name("warm_server.py")
# Variables that are read when a library is loaded: each set of their values has a server.
_AT_IMPORT = (
    "ATEN", "CUDA", "DNNL", "GOMP", "HF_", "KMP", "LANG", "LC_", "LD_", "MALLOC", "MKL", "NUMPY",
    "OMP", "ONEDNN", "OPENBLAS", "PYTHON", "SHARDPROOF", "TORCH", "TRANSFORMERS",
)  # fmt: skip
# A child can still follow these, or other libraries set them while the tests run.
_NOT_AT_IMPORT = (
    "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "OMP_NUM_THREADS", "PYTHONPATH",
    "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip
_PROGRAMS = (".py", "bin/shardproof")

Environment = Mapping[str, str]


class _Server:
    """An interpreter that forks."""

    def __init__(self, environment: Environment) -> None:
        # PYTHONPATH belongs to one command, and the server runs many.
        own = {name: each for name, each in environment.items() if name != "PYTHONPATH"}
        own["OPENBLAS_NUM_THREADS"] = "1"
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    str(SERVER),
                    str(theirs.fileno()),
                    *map(os.path.abspath, sys.path),
                ],
                pass_fds=[theirs.fileno()],
                env=own,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        said = self._control.recv(4096)
        if said != READY:
            raise RuntimeError(f"the server of warm commands did not start: {said.decode()!r}")
        atexit.register(self.close)

    def fork(self, streams: Sequence[int]) -> socket.socket:
        """A new child that waits for its command."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"c"], [theirs.fileno(), *streams])
        return ours

    def close(self) -> None:
        """End it and its children."""
        self._control.close()
        self._process.wait()


_starting = threading.Lock()
_servers: dict[frozenset[tuple[str, str]], _Server] = {}


def _server(environment: Environment) -> _Server:
    key = frozenset(
        (name, value)
        for name, value in environment.items()
        if name.startswith(_AT_IMPORT) and name not in _NOT_AT_IMPORT
    )
    with _starting:
        if key not in _servers:
            rest = {name: v for name, v in environment.items() if name != "OMP_NUM_THREADS"}
            _servers[key] = _Server(rest)
        return _servers[key]


class Process:
    """A command that runs.

    Attributes:
        pid: its process id; it leads a session and a group of this number.
        returncode: None while it runs; then its exit code, or minus the signal that ended it.
        stdout, stderr: what it writes, if no streams were given; its input is then empty.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        streams: tuple[int, int, int] | None = None,
        cwd: str | Path | None = None,
        env: Environment | None = None,
    ) -> None:
        self.args = [str(word) for word in command]
        self.returncode: int | None = None
        environment = dict(os.environ if env is None else env)
        request = _read(self.args[1:])
        request |= {"environment": environment, "directory": str(cwd or Path.cwd())}
        server = _server(environment)
        with ExitStack() as theirs:
            if streams is None:
                (self.stdout, out), (self.stderr, err) = _pipe(theirs), _pipe(theirs)
                nothing = theirs.enter_context(open(os.devnull))
                streams = (nothing.fileno(), out, err)
            self._socket = server.fork(streams)
        self._socket.sendall(pickle.dumps(request))
        self.pid = int.from_bytes(self._socket.recv(8), "little")  # its session is there by then

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            self._socket.settimeout(timeout)
            try:
                said = self._socket.recv(8)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            if not said:
                raise RuntimeError("the server of warm commands is gone")
            self.returncode = int.from_bytes(said, "little", signed=True)
            self._socket.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal to it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it has written so far and was not read, output and errors."""
        with ThreadPoolExecutor(2) as readers:
            read = [readers.submit(each.read) for each in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # so that the readers come to an end
                raise
        self.close()
        return read[0].result(), read[1].result()

    def close(self) -> None:
        """End it; what it has written cannot be read any more."""
        self.kill()
        self.stdout.close()
        self.stderr.close()

    def kill(self) -> None:
        """End it and everything in its group, and wait for it."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def run(
    command: Sequence[str | Path],
    *,
    cwd: str | Path | None = None,
    env: Environment | None = None,
    timeout: float | None = None,
    input: str = "",
) -> "subprocess.CompletedProcess[str]":
    """Run `[sys.executable, ...]` to its end; its exit code and what it wrote.

    Raises:
        subprocess.TimeoutExpired: it was not over within `timeout` seconds; it was ended.
    """
    with _file(input) as given, _file() as out, _file() as err:
        streams = (given.fileno(), out.fileno(), err.fileno())
        process = Process(command, streams=streams, cwd=cwd, env=env)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            process.kill()
            error.stdout, error.stderr = _text(out), _text(err)
            raise
        finally:
            process.kill()
        return subprocess.CompletedProcess(
            process.args, process.wait(), stdout=_text(out), stderr=_text(err)
        )


def printed(code: str, *, timeout: float = 120.0) -> str:
    """What a program prints that finds the tests' helpers; warnings are errors in it."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = run(command, env={**os.environ, "PYTHONPATH": path}, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_process(
    command: list[str], *, stdin: int, environment: Environment, directory: Path
) -> Process:
    """`shardproof.engines.processes.start_process` for tests, which start many ranks."""
    return Process(command, streams=(stdin, 1, 2), cwd=directory, env=environment)


def start_ranks(
    command: Sequence[str | Path], *, ranks: int, env: Environment | None = None
) -> list[Process]:
    """Start a command once for each rank, with the variables that torchrun sets."""
    environment = _torchrun_environment(ranks, env)
    return [
        Process(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def _torchrun_environment(ranks: int, env: Environment | None) -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    environment = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1"}
    environment |= {name: str(value) for name, value in shared.items()}
    environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def run_as_ranks(
    command: Sequence[str | Path],
    *,
    ranks: int,
    cwd: str | Path | None = None,
    env: Environment | None = None,
    timeout: float = 250.0,
) -> "subprocess.CompletedProcess[str]":
    """Run a command once for each rank, with the variables that torchrun sets.

    As under torchrun, the exit code is 1 and the other ranks are ended where one of them fails.
    What they wrote follows in the order of the ranks. tests/test_faults.py, tests/test_cli.py and
    tests/test_cases.py start torchrun itself.
    """
    environment = _torchrun_environment(ranks, env)
    with ExitStack() as opened:
        outs, errs = ([opened.enter_context(_file()) for _ in range(ranks)] for _ in range(2))
        nothing = opened.enter_context(_file())
        processes = [
            Process(
                command,
                streams=(nothing.fileno(), outs[rank].fileno(), errs[rank].fileno()),
                cwd=cwd,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
        deadline = time.monotonic() + timeout
        while None in (codes := [each.poll() for each in processes]) and not any(codes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for each in processes:
            each.kill()
        out, err = ("".join(map(_text, files)) for files in (outs, errs))
        if None in codes and not any(codes):
            raise subprocess.TimeoutExpired(processes[0].args, timeout, out, err)
        return subprocess.CompletedProcess(processes[0].args, int(any(codes)), out, err)


def _pipe(theirs: ExitStack) -> tuple[IO[str], int]:
    """What a child writes, and the end where it writes, which is closed with `theirs`."""
    ours, end = os.pipe()
    theirs.callback(os.close, end)
    return open(ours), end


def _file(text: str = "") -> IO[bytes]:
    file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.write(text.encode())
    file.seek(0)
    return file


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode().replace("\r\n", "\n")


def _read(words: list[str]) -> dict[str, Any]:
    """What follows the interpreter, as the server takes it."""
    request: dict[str, Any] = {"command": words, "warnings": []}
    rest = list(words)
    while rest and rest[0].startswith(("-W", "-B")):  # -B: how the tests themselves were started
        option = rest.pop(0)
        if option.startswith("-W"):
            request["warnings"].append(option[2:] or rest.pop(0))
    kinds = {"-m": "module", "-c": "code"}
    if rest and rest[0] in kinds:
        return request | {"kind": kinds[rest[0]], "program": rest[1], "arguments": rest[2:]}
    if not rest or not rest[0].endswith(_PROGRAMS):
        raise ValueError(f"{words} is no program that can be forked: start it with subprocess")
    return request | {"kind": "script", "program": rest[0], "arguments": rest[1:]}
