"""Saves in the background: the same bytes as in the foreground, and every error is raised once."""

import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardproof as sp
import warm
from shardproof.axis import Axis
from shardproof.checkpoint import background
from shardproof.checkpoint.manifest import find_damage
from shardproof.errors import UsageError
from test_checkpoint import cut, hashes, train

PLACES = [(1, "threads"), (3, "threads"), (2, "processes"), (3, "gloo")]
WITH_TESTS = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def work(axis: Axis, folder: Path) -> None:
    """Save in the foreground and in the background, and train on before that is whole."""
    model, optimizer = cut(axis)
    train(model, optimizer, range(2))
    sp.save(folder / "foreground", model, optimizer, step=2, extra="x")
    sp.save(folder / "background", model, optimizer, step=2, extra="x", background=True)
    train(model, optimizer, range(2, 5))
    sp.save(folder / "later", model, optimizer, step=5, background=True)
    sp.wait_for_save(model)
    sp.save(folder / "again", model, optimizer, step=5)


@pytest.mark.parametrize(("degree", "engine"), PLACES)
def test_the_bytes_are_those_of_the_moment(
    degree: int, engine: str, pool: Any, tmp_path: Path
) -> None:
    pool(degree, engine).run(lambda axis: work(axis, tmp_path))
    assert hashes(tmp_path / "background") == hashes(tmp_path / "foreground")
    assert hashes(tmp_path / "later") == hashes(tmp_path / "again")
    assert find_damage(tmp_path / "background") == []
    assert sorted(os.listdir(tmp_path)) == ["again", "background", "foreground", "later"]


def without_room(axis: Axis, path: Path, then: str) -> list[str]:
    """The errors of a save in the background that rank 1 cannot write, and of what follows."""
    model, optimizer = cut(axis)
    train(model, optimizer, range(1))
    if axis.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    sp.save(path, model, optimizer, background=True)

    def steps() -> None:
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            train(model, optimizer, range(1))

    follow: dict[str, Callable[[], Any]] = {
        "wait": lambda: sp.wait_for_save(model),
        "save": lambda: sp.save(path.with_name("other"), model, optimizer),
        "load": lambda: sp.load(path, model, optimizer),
        "step": steps,
    }
    with pytest.raises(UsageError) as raised:
        follow[then]()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    train(model, optimizer, range(1))  # it was raised once, and the ranks go on
    sp.save(path.with_name("after"), model, optimizer)
    return [str(raised.value)]


@pytest.mark.parametrize("then", ["wait", "save", "load", "step"])
def test_an_error_is_raised_on_all_ranks_by_what_follows(then: str, tmp_path: Path) -> None:
    path = tmp_path / "here"
    sp.launch(lambda axis: sp.save(path, *cut(axis)), degree=1)
    before = hashes(path)
    said = sp.launch(lambda axis: without_room(axis, path, then), degree=2, engine="processes")
    assert said[0] == said[1]
    assert re.search(r"saving .*here in the background failed.*: File too large\.", said[0][0])
    assert hashes(path) == before
    assert sorted(os.listdir(tmp_path)) == ["after", "here"]


def test_ranks_that_are_processes_finish_before_the_call_returns(tmp_path: Path) -> None:
    """The launcher kills its ranks some seconds after they have returned."""

    def save(axis: Axis) -> None:
        original = background.write_from
        background.write_from = lambda *arguments: (time.sleep(1.0), original(*arguments))
        sp.save(tmp_path / "here", *cut(axis), background=True)

    began = time.monotonic()
    sp.launch(save, degree=2, engine="processes")
    assert time.monotonic() - began > 1.0
    assert find_damage(tmp_path / "here") == []

    def fail(axis: Axis) -> None:
        def write_from(*_: object) -> None:
            raise OSError(28, "No space left on device")

        background.write_from = write_from
        sp.save(tmp_path / "there", *cut(axis), background=True)

    with pytest.raises(Exception, match="No space left on device"):
        sp.launch(fail, degree=2, engine="processes")
    assert os.listdir(tmp_path) == ["here"]


def hooked(axis: Axis, folder: Path) -> None:
    """Saves that overtake each other, and hooks of one's own around them."""
    model, optimizer = cut(axis)
    calls: list[int] = []
    sp.save(folder / "first", model, optimizer, background=True)
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        sp.save(folder / "latest", model, optimizer, step=step, background=True)
        sp.save(folder / "best", model, optimizer, step=step, background=True)
    train(model, optimizer, range(2))
    assert len(calls) == 8


def test_steps_go_on_after_many_saves(pool: Any, tmp_path: Path) -> None:
    pool(2, "threads").run(lambda axis: hooked(axis, tmp_path))
    # A call on ranks ends when what it saves is whole.
    assert sorted(os.listdir(tmp_path)) == ["best", "first", "latest"]
    assert find_damage(tmp_path / "best") == []


UNAWAITED = """
import sys
import shardproof as sp
from test_checkpoint import cut
sp.save(sys.argv[1], *cut(sp.Axis.solo()), background=True)
"""


def test_a_process_that_ends_finishes_its_save(tmp_path: Path) -> None:
    path = tmp_path / "here"
    done = warm.run([sys.executable, "-c", UNAWAITED, str(path)], env=WITH_TESTS)
    assert (done.returncode, done.stderr) == (0, "")
    assert find_damage(path) == []


def test_an_error_that_nothing_raised_is_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, optimizer = cut(Axis.solo())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(background, "write_from", fail)
    sp.save(tmp_path / "here", model, optimizer, background=True)
    background._report_all()
    assert re.search(r"error: saving .*here in the background failed on rank 0: .*No space",
                     capfd.readouterr().err)  # fmt: skip
    with pytest.raises(UsageError, match="No space left"):
        sp.wait_for_save(model)
    background._report_all()
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path) == []


def test_training_goes_on_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    may_write, original = threading.Event(), background.write_from

    def slow(*arguments: Any) -> None:
        assert may_write.wait(60.0)
        original(*arguments)

    monkeypatch.setattr(background, "write_from", slow)
    model, optimizer = cut(Axis.solo())
    sp.save(tmp_path / "here", model, optimizer, background=True)
    train(model, optimizer, range(3))
    assert not (tmp_path / "here").exists()
    may_write.set()
    sp.wait_for_save(model)
    fresh = cut(Axis.solo())
    assert sp.load(tmp_path / "here", *fresh).step == 0
    changed = [
        name
        for (name, ours), theirs in zip(
            model.named_parameters(), fresh[0].parameters(), strict=True
        )
        if not torch.equal(ours, theirs)
    ]
    assert changed, "the training had not gone on"
