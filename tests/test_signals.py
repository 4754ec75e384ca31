"""Signals, flags and streams: what a process was started with, and how it is told to end."""

import contextlib
import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from shardproof import c_modules, comm
from shardproof.axis import Axis
from shardproof.cli import signals
from shardproof.cli.main import Commands
from shardproof.engines import interpreter
from shardproof.engines.watch import _describe_exit
from shardproof.errors import RankError
from shardproof.ranks import launch, open_ranks
from shardproof.stop_signal import StopSignal
from shardproof.transport.rendezvous import _Patience

LIMIT = 120.0  # seconds that nothing here needs, on a machine however busy
FROM_HERE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


def take(dispositions: dict[signal.Signals, Any], blocked: tuple[signal.Signals, ...] = ()) -> None:
    """Runs in a child before its program: what it is to inherit."""
    for number, disposition in dispositions.items():
        signal.signal(number, disposition)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def start(
    arguments: list[str], *, ignored: bool = False, blocked: tuple[Any, ...] = (), **options: Any
) -> "subprocess.Popen[str]":
    """A Python process that has inherited default signals, or that all are ignored."""
    disposition = signal.SIG_IGN if ignored else signal.SIG_DFL
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, *arguments],
        preexec_fn=lambda: take(dict.fromkeys(FROM_HERE, disposition), blocked),
        env={**os.environ, "PYTHONPATH": path, **options.pop("env", {})},
        text=True,
        **options,
    )


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# What children inherit -------------------------------------------------------------------------

REPORT = """
import json
found = {
    "ignored": [each.name for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
                if signal.getsignal(each) is signal.SIG_IGN],
    "interrupts": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "blocked": [each.name for each in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
}
"""


@pytest.fixture
def _odd_signals() -> Iterator[None]:
    """Everything ignored or blocked in this process, as whatever starts it may leave it."""
    before = {number: signal.getsignal(number) for number in FROM_HERE}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
    for number in FROM_HERE:
        signal.signal(number, signal.SIG_IGN)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.usefixtures("_odd_signals")
def test_a_started_interpreter_has_default_signals_whatever_this_process_has(
    tmp_path: Path,
) -> None:
    path = tmp_path / "found"
    code = f"import signal\n{REPORT}\nopen({str(path)!r}, 'w').write(json.dumps(found))"
    subprocess.run(interpreter.command(code), check=False)
    assert json.loads(path.read_text()) == {"ignored": [], "interrupts": True, "blocked": []}


def test_a_signal_that_another_thread_got_is_handled_soon() -> None:
    """It does not end the wait of the main thread, as one that comes just before the wait."""
    came: list[float] = []

    def work(axis: Axis) -> None:
        begun = time.monotonic()
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        while not came and time.monotonic() < begun + 60.0:
            time.sleep(0.01)

    before = signal.signal(signal.SIGUSR1, lambda *_: came.append(time.monotonic()))
    try:
        with open_ranks(1, "threads", threads=1) as ranks:
            begun = time.monotonic()
            ranks.run(work)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came
    assert came[0] - begun < 30.0


def test_a_signal_while_a_stop_signal_is_entered_is_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = tempfile.mkdtemp

    def slow(*args: Any, **options: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return make(*args, **options)

    monkeypatch.setattr(tempfile, "mkdtemp", slow)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.was_requested_here
        assert pickle.loads(pickle.dumps(stop)).was_requested_here  # in a rank that is a process
    assert signal.getsignal(signal.SIGTERM) == before

    def full(*_: Any, **__: Any) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(OSError, match="no space"):
        StopSignal().__enter__()
    assert signal.getsignal(signal.SIGTERM) == before


IGNORED = """
import os, signal, sys, threading
from shardproof.errors import RankError
from shardproof.ranks import open_ranks

def interrupt_soon():
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

def waits(axis):
    if axis.rank == 1:
        threading.Event().wait(100)
    axis.transport.gather_objects(1, call=None)

def killed(axis):
    os.kill(os.getpid(), signal.SIGKILL)

def handlers(axis):
    return [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)]

for engine in ("threads", "processes"):
    with open_ranks(2, engine, threads=1) as ranks:
        found = ranks.run(handlers)
        if engine == "processes":
            print(found == [[signal.SIG_DFL] * 3] * 2)
        interrupt_soon()
        try:
            ranks.run(waits)
        except KeyboardInterrupt:
            print("interrupted", signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)
with open_ranks(1, "processes") as ranks:
    try:
        ranks.run(killed)
    except RankError as error:
        print(error, flush=True)
"""


def test_launch_is_the_same_where_signals_were_ignored_or_blocked_at_start() -> None:
    process = start(["-c", IGNORED], ignored=True, blocked=(signal.SIGINT,), stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=LIMIT)
    assert out.splitlines() == [
        "interrupted True",
        "True",
        "interrupted True",
        "rank 0 of 1 is gone: its process has ended, and how is not known, for this process "
        "ignores SIGCHLD",
    ]


def test_an_exit_is_described_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _describe_exit(-9) == "was killed by signal 9 (SIGKILL)"
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert "for this process ignores SIGCHLD" in _describe_exit(0)


# Flags, streams, places ------------------------------------------------------------------------

STARTED = """
import json, os, sys
import torch
from shardproof.errors import RankError
from shardproof.ranks import launch, open_ranks
from shardproof.stop_signal import StopSignal

target, place = sys.argv[1:]

def state(axis=None):
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0].islower()}
    del flags["count"], flags["index"]
    return [flags, sys.warnoptions, {**sys._xoptions}]

torch.ones(64, 64) @ torch.ones(64, 64)
os.chdir(place)
os.rmdir(place)
found = launch(lambda axis: [state(), sys.stdin.read()], degree=1, engine="processes")
with open(target, "w") as file:
    json.dump([found, state()], file)
"""


def test_workers_have_this_interpreters_flags_and_need_no_streams_and_no_place(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text(STARTED)
    (tmp_path / "gone").mkdir()
    target = tmp_path / "found"
    flags = ["-I", "-W", "error", "-X", "utf8", "-X", "no_debug_ranges"]
    command = [sys.executable, *flags, str(tmp_path / "script.py"), target, tmp_path / "gone"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], timeout=LIMIT, check=False
    )
    assert done.returncode == 0
    ((there, stdin),), here = json.loads(target.read_text())
    assert there == here
    assert stdin == ""
    assert (here[0]["isolated"], here[0]["utf8_mode"], here[1]) == (1, 1, ["error"])


def test_every_flag_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in dir(sys.flags) if name[0].islower()]
    flags: Any = types.SimpleNamespace(**dict.fromkeys(names, 0))
    flags.optimize = flags.safe_path = flags.no_user_site = flags.no_site = flags.dev_mode = 1
    flags.dont_write_bytecode = 1
    monkeypatch.setattr(sys, "flags", flags)
    monkeypatch.setattr(sys, "warnoptions", ["default", "error::UserWarning"])
    monkeypatch.setattr(sys, "_xoptions", {"dev": True, "int_max_str_digits": "0"})
    found = interpreter.flags()
    assert {"-O", "-B", "-P", "-s", "-S", "-Werror::UserWarning"} <= set(found)
    assert found.count("dev") == 1
    assert found[found.index("int_max_str_digits=0") - 1] == "-X"


def test_a_place_that_is_gone_is_left_out_of_what_is_handed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", ["", "below", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", f"src{os.pathsep}{tmp_path}")
    monkeypatch.chdir(tmp_path)
    assert interpreter.search_path() == [str(tmp_path), str(tmp_path / "below"), str(tmp_path)]
    assert interpreter.environment()["PYTHONPATH"] == str(tmp_path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert interpreter.search_path() == [str(tmp_path)]


def test_an_output_that_nobody_reads_fails_the_rank_that_wrote() -> None:
    heard, written = os.pipe()
    os.close(heard)
    output = os.dup(1)
    os.dup2(written, 1)
    try:
        with open_ranks(1, "processes") as ranks:
            ranks.run(lambda axis: None)
            with pytest.raises(RankError, match=r"^rank 0 of 1 raised BrokenPipeError"):
                ranks.run(lambda axis: sys.stdout.write("without an end of line"))
    finally:
        os.dup2(output, 1)
        os.close(output)
        os.close(written)


# A rank that holds the interpreter -------------------------------------------------------------


@pytest.mark.parametrize("with_core", [True, False])
def test_a_rank_that_holds_the_interpreter_gets_nobody_blamed(
    with_core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 keeps rank 1 from coming, for longer than the timeout; rank 0 waits for both."""
    if not with_core:
        monkeypatch.setattr(c_modules, "shm", lambda: None)
    elif c_modules.shm() is None:
        pytest.skip("the C core was not built")
    sleep = ctypes.PyDLL(None).usleep  # as any call into C that keeps the interpreter lock

    def work(axis: Axis) -> list[float]:
        comm.all_reduce(torch.ones(2), axis, direction="forward")
        if axis.rank == 2:
            time.sleep(0.1)  # the others are in their sum, or on their way
            holding.set()
            sleep(900_000)
            sleep(900_000)
        elif axis.rank == 1:
            holding.wait(LIMIT)
        return comm.all_reduce(torch.ones(2), axis, direction="forward").tolist()

    holding = threading.Event()
    assert launch(work, degree=3, timeout=1.0) == [[3.0, 3.0]] * 3


def test_time_in_which_nobody_could_come_is_not_counted() -> None:
    patience = _Patience()
    assert patience.count(1, 0.02) == pytest.approx(0.02)
    assert patience.count(1, 0.04) == pytest.approx(0.04)
    assert patience.count(1, 5.04) == pytest.approx(0.29), "the interpreter was not free"
    assert patience.count(1, 5.06) == pytest.approx(0.31)
    assert patience.count(2, 5.5) == pytest.approx(0.25), "another collective"
    assert patience.count(2, 0.02) == pytest.approx(0.27), "a further wait of the same one"


# Commands --------------------------------------------------------------------------------------


def ours(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("shardproof")]


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(each) for each in path.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


ENDED = {"processes": (signal.SIGTERM, 143), "threads": (signal.SIGHUP, 129)}


def test_a_signal_ends_prove_in_order(tmp_path: Path) -> None:
    """Ranks as processes and ranks as threads, both at once: most of the time they start."""
    started = {}
    for engine in ENDED:
        (tmp_path / engine).mkdir()
        started[engine] = start(
            ["-m", "shardproof", "prove", "--case", "ffn", "--degrees", "2,3", "--engine", engine,
             "--json", str(tmp_path / f"{engine}.json")],
            env={"TMPDIR": str(tmp_path / engine)},
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def end(engine: str) -> int:
        """Send the signal while the ranks work; the exit code."""
        process, line = started[engine], ""
        assert process.stderr is not None
        while "degree 2" not in line:
            line = process.stderr.readline()
            assert line, "it ended by itself"
        assert ours(tmp_path / engine), "there is a folder to be removed"
        children = children_of(process.pid)
        process.send_signal(ENDED[engine][0])
        process.communicate(timeout=LIMIT)
        wait_until(lambda: not any(map(is_alive, children)))
        return process.returncode

    with ThreadPoolExecutor() as both:
        codes = dict(zip(ENDED, both.map(end, ENDED), strict=True))
    assert codes == {engine: code for engine, (_, code) in ENDED.items()}
    for engine in ENDED:
        assert ours(tmp_path / engine) == []
        assert not (tmp_path / f"{engine}.json").exists()


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    yield
    signal.signal(number, before)


def test_a_signal_that_was_ignored_stays_ignored_and_the_first_one_counts() -> None:
    with (
        handled(signal.SIGHUP, signal.SIG_IGN),
        handled(signal.SIGTERM, signal.SIG_DFL),
        handled(signal.SIGINT, signal.SIG_IGN),
    ):
        with signals.ending_in_order() as ending:
            os.kill(os.getpid(), signal.SIGHUP)  # as under nohup
            assert ending.code == 0
            with pytest.raises(KeyboardInterrupt):  # as in a background job of a script
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(signals.Ended) as caught:
                signal.raise_signal(signal.SIGTERM)
            assert caught.value.code == 143
            signal.raise_signal(signal.SIGTERM)  # while the first one is being obeyed
        assert ending.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_command_within_a_program_leaves_its_signals_alone() -> None:
    with handled(signal.SIGTERM, signal.SIG_DFL):
        seen: list[object] = []

        @click.command("look")
        def look() -> int:
            seen.append(signal.getsignal(signal.SIGTERM))
            return 0

        with pytest.raises(SystemExit) as caught:
            Commands("group", {"look": look}).main(["look"], prog_name="group")
    assert caught.value.code == 0
    assert seen == [signal.SIG_DFL]


STUCK = """
import atexit, importlib.util, os, signal, sys, threading
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
signals = importlib.util.module_from_spec(spec)
sys.modules["signals"] = signals
spec.loader.exec_module(signals)
signals._PATIENCE = 0.2
atexit.register(lambda: print("cleaned", flush=True))
lock = threading.Lock()
lock.acquire()
import ctypes
with signals.ending_in_order():
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(100)  # in C, where no handler in Python is called
"""


def test_a_command_that_is_stuck_in_c_is_ended_all_the_same() -> None:
    process = start(["-c", STUCK, signals.__file__], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    # A signal interrupts this C call too, and the next one begins before Python looks up: so the
    # thread that is not the main one takes it.
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=LIMIT)
    assert (out, process.returncode) == ("cleaned\n", 143)
