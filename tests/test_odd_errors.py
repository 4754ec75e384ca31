"""Ranks that raise what no rank should: errors that cannot say what they are, and bad results.

Whatever the user's classes do, the caller gets one error within seconds.
"""

import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import CliRunner

from places import ENGINES, Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.cli.main import main
from shardproof.engines import capacity, messages
from shardproof.error_text import LONGEST_TEXT, cut, describe_error, text_of, within
from shardproof.errors import RankError, ShapeError, UsageError
from shardproof.ranks import launch, open_ranks
from shardproof.transport.base import PeerError

SOON = 30.0  # seconds, on a busy machine


class CannotSpeakError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class LeavesError(ShapeError):
    """One of shardproof's own, which would be raised again as it is."""

    def __str__(self) -> str:
        raise SystemExit(3)


class NeverDoneError(Exception):
    def __str__(self) -> str:
        while True:
            time.sleep(0.01)


class NoTextError(Exception):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


class UnpicklableForEverError(Exception):
    def __reduce__(self) -> NoReturn:
        while True:
            time.sleep(0.01)


class MineAlone(BaseException):
    pass


def raising(make: Callable[[], BaseException], *, rank: int = 0) -> Callable[[Axis], None]:
    """A function that raises on one rank, while the others wait for it."""

    def work(axis: Axis) -> None:
        if axis.rank == rank:
            raise make()
        comm.all_reduce(torch.ones(3), axis, direction="forward")

    return work


ODD: dict[str, tuple[Callable[[], BaseException], str]] = {
    "fails": (
        CannotSpeakError,
        r"CannotSpeakError: \(its text is not available: its __str__ rais",
    ),
    "leaves": (LeavesError, "LeavesError: .*__str__ raised SystemExit"),
    "hangs": (NeverDoneError, "NeverDoneError: .*its __str__ was not over within 2 s"),
    "no text": (NoTextError, "NoTextError: .*__str__ raised TypeError"),
    "inside": (lambda: ValueError(CannotSpeakError()), "ValueError: .*__str__ raised RuntimeError"),
    "no Exception": (lambda: MineAlone("why"), "raised MineAlone: why"),
    "interrupt": (KeyboardInterrupt, "raised KeyboardInterrupt"),
    "generator": (GeneratorExit, "raised GeneratorExit"),
    "exit": (lambda: SystemExit(3), r"left early: it called sys.exit\(3\)"),
    "odd exit": (lambda: SystemExit(CannotSpeakError()), "SystemExit: .*__str__ raised Runtime"),
    "group": (
        lambda: ExceptionGroup("several", [ValueError("one"), KeyError("two")]),
        r"raised ExceptionGroup: several \(2 sub-exceptions\)",
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_thread_that_raises_an_odd_error_ends_all_within_seconds(odd: str) -> None:
    make, message = ODD[odd]
    begun = time.monotonic()
    with pytest.raises(RankError, match=f"^rank 1 of 2 (raised )?{message}") as caught:
        launch(raising(make, rank=1), degree=2)
    assert time.monotonic() - begun < SOON
    assert caught.value.rank == 1
    assert "in work" in str(caught.value), "the place is told although the text cannot be"


@pytest.mark.parametrize("odd", ["hangs"])
def test_a_process_that_raises_an_odd_error_ends_all_within_seconds(odd: str) -> None:
    make, message = ODD[odd]
    with open_ranks(1, "processes", threads=1) as ranks:
        ranks.run(lambda axis: None)
        begun = time.monotonic()
        with pytest.raises(RankError, match=f"^rank 0 of 1 raised {message}"):
            ranks.run(raising(make))
        assert time.monotonic() - begun < SOON


def test_an_error_whose_pickling_never_ends_is_told_in_words() -> None:
    with pytest.raises(
        RankError, match=r"^rank 0 of 1 raised UnpicklableForEverError: x"
    ) as caught:
        launch(raising(lambda: UnpicklableForEverError("x")), degree=1, engine="processes")
    assert caught.value.__cause__ is None


@ENGINES
def test_a_text_of_50_megabytes_is_cut(engine: str) -> None:
    with pytest.raises(RankError, match="rank 0 of 1 raised ValueError: xxxx") as caught:
        launch(raising(lambda: ValueError("x" * 50_000_000)), degree=1, engine=engine)
    assert len(str(caught.value)) < 100_000
    assert "(49,996,000 characters left out)" in str(caught.value)


def test_a_group_of_symptoms_is_a_symptom() -> None:
    def work(axis: Axis) -> None:
        if axis.rank == 1:
            time.sleep(0.3)
            raise ValueError("the cause")
        try:
            comm.all_reduce(torch.ones(3), axis, direction="forward")
        except PeerError as error:
            group = ExceptionGroup("all that went wrong", [error])
        raise group

    with pytest.raises(RankError, match=r"^rank 1 of 2 raised ValueError: the cause"):
        launch(work, degree=2)


@ENGINES
def test_what_fails_where_nobody_can_catch_it_changes_no_result(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> list[float]:
        class Trap:
            def __del__(self) -> None:
                raise ValueError("in __del__")

        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            Trap()
            gc.collect()
            return comm.all_reduce(torch.ones(1), axis, direction="forward").tolist()
        finally:
            sys.unraisablehook = hook

    assert pool(2, engine).run(work) == [[2.0]] * 2


def test_telling_is_cut_and_never_waits() -> None:
    assert text_of(ValueError()) == "ValueError"
    assert len(text_of(ValueError("x" * 10**6))) < LONGEST_TEXT + 100
    assert cut("abcdef", 6) == "abcdef"
    with pytest.raises(KeyboardInterrupt):
        within(5.0, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    told = describe_error(NeverDoneError())
    assert told.trace.startswith(
        "Traceback (most recent call last):\nNeverDoneError: (its text is not available"
    )


# Results ---------------------------------------------------------------------------------------


class Result:
    """What does odd things when it is pickled, or unpickled where the caller is."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        if self.how == "leaves when unpickled":
            return sys.exit, (3,)
        if self.how == "leaves when pickled":
            raise SystemExit(3)
        while True:
            time.sleep(0.01)


def test_a_result_that_leaves_when_it_is_unpickled_is_named_and_breaks_nothing(pool: Pool) -> None:
    ranks = pool(2, "processes")
    with pytest.raises(UsageError, match="the result of rank 0 cannot be unpickled: SystemExit: 3"):
        ranks.run(lambda axis: Result("leaves when unpickled"))
    assert ranks.run(lambda axis: axis.rank) == [0, 1]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("leaves when pickled", "cannot be pickled, and must be .*: SystemExit: 3"),
        ("never done", "cannot be pickled: it was not over within 1 s"),
    ],
)
def test_a_result_that_cannot_be_pickled_is_named(how: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"the result of rank 0, of type Result, {message}"):
        launch(lambda axis: Result(how), degree=1, engine="processes", timeout=1.0)


# More than the machine has ---------------------------------------------------------------------

TOO_MANY = [257 * 16 * 1024, 20_000, 100_000, 2**31, 2**31 - 1, 10**30]


@ENGINES
@pytest.mark.parametrize("threads", TOO_MANY)
def test_threads_that_no_machine_has_are_refused(engine: str, threads: int) -> None:
    few = threads < 2**31
    why = r"more than \d+, the most threads" if few else "out of range. Use 1 to 2147483647"
    with pytest.raises(UsageError, match=f"threads={threads} is {why}"):
        launch(lambda axis: None, degree=1, engine=engine, threads=threads)


@ENGINES
@pytest.mark.parametrize(("degree", "threads"), [(100_000, 1), (10**30, 1), (10_000, 8)])
def test_ranks_that_no_machine_has_are_refused(engine: str, degree: int, threads: int) -> None:
    message = rf"degree {degree} with {threads} threads on each rank is more than \d+, the most"
    with pytest.raises(UsageError, match=message):
        launch(lambda axis: None, degree=degree, engine=engine, threads=threads)


@ENGINES
def test_threads_that_this_process_may_not_start_are_refused(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with few processes: OpenMP would end the process."""
    start, left = threading.Thread.start, iter(range(20))

    def start_some(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    monkeypatch.setattr(capacity, "_tried", 1)
    message = r"32 threads are wanted on this machine, and only 20 could be started \(can't start"
    with pytest.raises(UsageError, match=message):
        launch(lambda axis: None, degree=2, engine=engine, threads=16)


def test_rank_threads_that_cannot_be_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(capacity, "_tried", 8)  # tried before, and now others have them
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(UsageError, match=r"cannot start 8 threads: can't start new thread. Use a"):
        launch(lambda axis: None, degree=8, threads=1)


def test_a_rank_that_cannot_have_its_threads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        raise RuntimeError("expects a number that fits")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    with pytest.raises(UsageError, match="a rank cannot have 3 threads: expects a number that fi"):
        launch(lambda axis: None, degree=2, threads=3)


def prove(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(main, ["prove", "--case", "linear-column", *arguments])
    return found.exit_code, found.stderr


@pytest.mark.parametrize("threads", ["20000", "100000", "2147483648"])
def test_the_command_refuses_threads_that_no_machine_has(threads: str) -> None:
    code, said = prove("--threads", threads)
    assert code == 2
    why = "more than " if int(threads) < 2**31 else "out of range. Use 1 to 2147483647"
    assert f"error: --threads {threads} is {why}" in said


def test_the_command_refuses_degrees_that_no_machine_has() -> None:
    code, said = prove("--degrees", "1,100000", "--leaves", "100000")
    assert code == 2
    assert "error: degree 100000 with 1 threads on each rank is more than " in said


def test_the_command_refuses_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "20000")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 20_000)
    code, said = prove()
    assert code == 2
    assert "error: OMP_NUM_THREADS=20000 is more than " in said


# Starting processes ----------------------------------------------------------------------------


def folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("shardproof-*")}


@pytest.mark.fresh_ranks
@pytest.mark.parametrize(
    ("where", "what", "error"),
    [
        (subprocess, "Popen", BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")),
        (subprocess, "Popen", OSError(errno.ENOMEM, "Cannot allocate memory")),
        (socket, "socketpair", OSError(errno.EMFILE, "Too many open files")),
    ],
)
def test_a_process_that_cannot_be_started_is_named(
    where: Any, what: str, error: OSError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []
    real = getattr(where, what)

    def start_one(*arguments: Any, **options: Any) -> Any:
        if started:
            raise error
        started.append(real(*arguments, **options))
        return started[0]

    monkeypatch.setattr(where, what, start_one)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    message = rf"cannot start the process of rank 1 of 3: .*{error.strerror}.*ulimit -u, -n and -v"
    with pytest.raises(UsageError, match=message):
        open_ranks(3, "processes")
    assert not folders()
    if where is subprocess:
        assert started[0].returncode == -signal.SIGKILL


def test_no_place_for_temporary_files_is_an_error_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: object) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(UsageError, match=r"needs a folder for temporary files.*Set TMPDIR"):
        open_ranks(2, "processes")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is full")
def test_a_full_disk_is_not_called_a_value_that_cannot_be_pickled() -> None:
    message = r"^/dev/full cannot be written: .*set TMPDIR to a directory that has some"
    with pytest.raises(UsageError, match=message):
        messages.write(torch.ones(100_000), Path("/dev/full"), what="the result of rank 0")


class NoClassError(Exception):
    __class__ = property(lambda self: 1 / 0)  # type: ignore[assignment]


class NoAttributesError(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise ValueError(name)


@pytest.mark.parametrize(("engine", "degree"), [("threads", 2), ("processes", 1)])
@pytest.mark.parametrize("kind", [NoClassError, NoAttributesError])
def test_an_exception_that_cannot_be_looked_at_ends_the_call(
    engine: str, degree: int, kind: type
) -> None:
    with pytest.raises(RankError, match=f"rank 0 of {degree} raised {kind.__name__}"):
        launch(raising(kind), degree=degree, engine=engine, timeout=20)
