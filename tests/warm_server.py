"""The interpreter behind `warm.py`: it imports what commands need, then forks one child for each.

Started as `python warm_server.py FD PATH...`, where FD is a socket and the rest is a search path.
Each message on the socket brings four file descriptors: a socket for one command and its standard
streams. A child is forked at once. It sends its process id on its socket, reads the command from
there, becomes what a new interpreter would be, and runs it. The server later says on the same
socket how the child ended. When nobody holds the other end of FD any more, the server ends all
children and itself.
"""

import atexit
import contextlib
import gc
import io
import os
import pickle
import random
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import types
import warnings
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

STREAMS = 3
READY = b"ready"
IMPORTED = (
    "torch",
    "torch._dynamo",  # which the first optimizer imports
    "shardproof.cli.main",
    "transformers",
    "transformers.models.llama.modeling_llama",
)


def serve(control: socket.socket) -> socket.socket:
    """Fork a child for each message; returns in each child, with the socket of its command."""
    waking, wake = os.pipe()
    for descriptor in (waking, wake):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(waking, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj == waking:
                os.read(waking, 4096)
                reap(running)
                continue
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1 + STREAMS)
            if not message:
                end(running)
            command = socket.socket(fileno=descriptors[0])
            child = os.fork()
            if child == 0:
                selector.close()
                signal.set_wakeup_fd(-1)
                for each in (waking, wake):
                    os.close(each)
                for each in (control, *running.values()):
                    each.close()
                for number, descriptor in enumerate(descriptors[1:]):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                return command
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            running[child] = command


def reap(running: dict[int, socket.socket]) -> None:
    """Tell who asked how each child that is over has ended."""
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        command = running.pop(child)
        with contextlib.suppress(OSError):  # who asked has left
            code = os.waitstatus_to_exitcode(status)
            command.sendall(code.to_bytes(8, "little", signed=True))
        command.close()


def end(running: dict[int, socket.socket]) -> None:
    """End all children, each of which leads a group of its own, and this process."""
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os._exit(0)


def become(command: socket.socket, base: list[str]) -> tuple[str, str]:
    """Take over what a new interpreter would start with; the kind of program and its name."""
    os.setsid()
    command.sendall(os.getpid().to_bytes(8, "little"))
    for each in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(each) not in (signal.SIG_DFL, None):
            is_interrupt = each == signal.SIGINT
            signal.signal(each, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    with command, command.makefile("rb") as stream:
        request: dict[str, Any] = pickle.load(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # an import has looked it up in the server's own environment
    os.chdir(request["directory"])
    sys.stdin = opened(0, "r", sys.stdin)
    sys.stdout = sys.__stdout__ = opened(1, "w", sys.stdout)
    sys.stderr = sys.__stderr__ = opened(2, "w", sys.stderr)
    sys.__stdin__ = sys.stdin
    for option in request["warnings"]:
        sys.warnoptions.append(option)
        warnings._processoptions([option])  # type: ignore[attr-defined]
    random.seed()
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    kind, name, arguments = request["kind"], request["program"], request["arguments"]
    first = str(Path(name).resolve().parent) if kind == "script" else "" if kind == "code" else None
    added = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = [os.getcwd() if first is None else first, *added, *base]
    sys.argv[:] = [{"code": "-c", "module": "-m", "script": name}[kind], *arguments]
    sys.orig_argv[:] = [sys.executable, *request["command"]]
    return kind, name


def opened(descriptor: int, mode: str, like: Any) -> io.TextIOWrapper:
    """A standard stream, as the interpreter opens it."""
    is_error, is_unbuffered = descriptor == STREAMS - 1, mode == "w" and like.write_through
    binary: BinaryIO = open(  # noqa: SIM115
        descriptor, mode + "b", buffering=0 if is_unbuffered else -1, closefd=False
    )
    return io.TextIOWrapper(
        binary,
        encoding=like.encoding,
        errors="backslashreplace" if is_error else like.errors,
        newline=None if mode == "r" else "\n",
        line_buffering=not is_unbuffered and (is_error or os.isatty(descriptor)),
        write_through=is_unbuffered,
    )


def run(kind: str, name: str) -> int:
    """Run the program as `__main__`; its exit code."""
    try:
        _run(kind, name)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        sys.stderr.write(f"{error.code}\n")
        return 1
    except BaseException as error:
        frames = error.__traceback__
        for _ in range(2):  # the two frames of this file
            frames = frames.tb_next if frames else None
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def finish(code: int) -> NoReturn:
    """End as an interpreter does, but leave its memory to the system, which is much faster."""
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads that are no daemons
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"Exception ignored in: {sys.stdout!r}\n{error!r}\n")
        code = 120
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _run(kind: str, name: str) -> None:
    if kind == "script":
        runpy.run_path(name, run_name="__main__")
    elif kind == "module":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(name, "<string>", "exec"), module.__dict__)


def import_all() -> None:
    """Import what commands need.

    Raises:
        RuntimeError: an import has started a thread, which a fork would not have.
    """
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # an optional library
            __import__(name)
    tasks = Path("/proc/self/task")  # Linux alone says which threads there are
    threads = len(list(tasks.iterdir())) if tasks.exists() else 1
    if threads != 1:
        raise RuntimeError(f"{threads} threads run after the imports, so nothing can be forked")
    gc.collect()
    gc.freeze()


def main() -> tuple[str, str]:
    """Serve; in each child, the program to run."""
    control = socket.socket(fileno=int(sys.argv[1]))
    base = sys.path[1:]
    sys.path[:0] = sys.argv[2:]  # what is imported here is what the tests import
    try:
        import_all()
    except Exception as error:
        control.sendall(repr(error).encode())
        raise
    control.sendall(READY)
    return become(serve(control), base)


if __name__ == "__main__":
    finish(run(*main()))
