"""The part of a save that goes on in a thread of each rank, while the model trains on.

The threads send nothing to each other, because their ranks may be sending for a step. They leave
marks in the directory instead: `.rank-2.written` when rank 2 has written its bytes, and
`.rank-2.hashed` with its hashes. Rank 0 then writes the manifest and gives the directory its name.
"""

import atexit
import contextlib
import functools
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.axis import Axis
from shardproof.checkpoint import manifest
from shardproof.checkpoint.directory import (
    MANIFEST,
    RANK_MARK,
    SavedDirectory,
    files_of,
    sync,
)
from shardproof.checkpoint.entries import axis_of
from shardproof.checkpoint.together import together
from shardproof.checkpoint.writing import PartWriter
from shardproof.errors import ShardproofError, UsageError
from shardproof.safetensors_file import bytes_of, write_from
from shardproof.wording import error_words, short_text

_POLL = 0.02  # seconds from one look at the marks to the next
_PATIENCE = 600.0  # seconds that a rank may take longer than another
_LAST_WRITES = 10.0  # seconds that a rank may take to see that another one has failed
_WRITTEN, _HASHED, _FAILED = "written", "hashed", "failed"


@dataclass(frozen=True)
class FilePart:
    """What a rank is to write into one file.

    Attributes:
        name: name of the file.
        blocks: offsets, and the bytes that begin there.
    """

    name: str
    blocks: tuple[tuple[int, memoryview], ...]


class CopyingWriter(PartWriter):
    """Keeps a copy of this rank's bytes of one file instead of writing them.

    Args:
        path: path of the file.
        axis: the ranks that share the tensors.
    """

    def __init__(self, path: Path, axis: Axis) -> None:
        super().__init__(path, axis, opens=False)
        self._blocks: list[tuple[int, memoryview]] = []

    def part(self) -> FilePart:
        """What was kept.

        Raises:
            RuntimeError: there was no memory for it.
        """
        if self.error is not None:
            raise self.error
        return FilePart(self._path.name, tuple(self._blocks))

    def _put(self, start: int, x: Tensor) -> None:
        self._blocks.append((start, bytes_of(x.to("cpu", copy=True).contiguous())))


class BackgroundSave:
    """A save that goes on in a thread of this rank.

    Args:
        directory: the name of the checkpoint.
        work: the directory that has the files until then.
        parts: what this rank writes.
        axis: the ranks; only their number and the place of this one are used.
        saved: on rank 0 the directory, which gets its name at the end.

    Attributes:
        error: what went wrong on this rank; None while it goes on, and if all went well.
    """

    def __init__(
        self,
        directory: Path,
        work: Path,
        parts: Sequence[FilePart],
        axis: Axis,
        saved: SavedDirectory | None,
    ) -> None:
        self.error: BaseException | None = None
        self._directory = directory
        self._work = work
        self._parts = parts
        self._rank, self._size = axis.rank, axis.size
        self._saved = saved
        self._creator = threading.get_ident()
        self._is_cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"save {directory.name}")

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: the process cannot have another thread.
        """
        _unraised.add(self)
        try:
            self._thread.start()
        except BaseException:
            _unraised.discard(self)
            raise

    def cancel(self) -> None:
        """End it, if it was started, without an error that is raised later."""
        self._is_cancelled.set()
        if self._thread.ident is not None:
            self._thread.join()
        _unraised.discard(self)

    @property
    def is_of_this_thread(self) -> bool:
        """Whether this thread has begun the save."""
        return self._creator == threading.get_ident()

    @property
    def is_done(self) -> bool:
        """Whether this rank has done its part."""
        return not self._thread.is_alive()

    def look(self, axis: Axis) -> bool:
        """Whether all ranks are done; all of them call it.

        Raises:
            ShardproofError: a rank has failed. All ranks raise.

        Comm:
            setup none in the ledger: small objects of all ranks go to all, uncounted.
        """
        # The error is set before the thread ends, so a rank that is done has it.
        mine = (self.is_done, self.error is not None)
        states = axis.gather_small(mine, what="the save in the background")
        if not any(has_failed for _, has_failed in states):
            return all(is_done for is_done, _ in states)
        self.cancel()
        what = f"saving {short_text(str(self._directory))} in the background"
        with together(axis, what):
            # A rank that was cancelled says less than the rank that failed.
            if self.error is not None and not isinstance(self.error, _CancelledError):
                raise self.error
        raise UsageError(
            f"{what} failed: {short_text(str(self._work))} was removed while it was written. Save "
            "again."
        )

    def wait(self, axis: Axis) -> None:
        """Wait until all ranks are done; all of them call it.

        Raises:
            ShardproofError: a rank has failed. All ranks raise.

        Comm:
            setup as `look`, until all are done.
        """
        while not self.look(axis):
            self._thread.join(timeout=_POLL)

    def finish(self) -> BaseException | None:
        """Wait for this rank's part; its error, which then counts as raised."""
        self._thread.join()
        _unraised.discard(self)
        return self.error

    def report(self) -> None:
        """Print an error that nothing has raised; called when the process ends."""
        self._thread.join()
        if self.error is not None and not isinstance(self.error, _CancelledError):
            sys.stderr.write(
                f"error: saving {self._directory} in the background failed on rank {self._rank}: "
                f"{error_words(self.error)}\n"
            )

    def _run(self) -> None:
        try:
            self._write()
            _unraised.discard(self)
        except BaseException as error:
            self.error = self._cause_elsewhere() or error
            self._parts = ()
            self._mark(_FAILED, error_words(error))
            if self._saved is not None:
                self._wait_for_ends()
                self._saved.abandon()

    def _cause_elsewhere(self) -> "_CancelledError | None":
        """Why this rank cannot go on, if that is the fault of another rank."""
        for rank in range(self._size):
            mark = self._work / f"{RANK_MARK}{rank}.{_FAILED}"
            with contextlib.suppress(OSError):
                if rank != self._rank and mark.exists():
                    return _CancelledError(f"rank {rank} failed: {json.loads(mark.read_text())}.")
        if self._is_cancelled.is_set() or not self._work.is_dir():
            return _CancelledError(f"{short_text(str(self._work))} is gone.")
        return None

    def _wait_for_ends(self) -> None:
        """Wait until no other rank writes, so that the directory can be removed."""
        end = time.monotonic() + _LAST_WRITES
        others = [rank for rank in range(self._size) if rank != self._rank]
        while time.monotonic() < end and not all(map(self._has_ended, others)):
            time.sleep(_POLL)

    def _has_ended(self, rank: int) -> bool:
        marks = (self._work / f"{RANK_MARK}{rank}.{stage}" for stage in (_FAILED, _HASHED))
        return any(mark.exists() for mark in marks)

    def _write(self) -> None:
        for part in self._parts:
            descriptor = os.open(self._work / part.name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for start, content in part.blocks:
                    write_from(descriptor, start, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._parts = ()
        self._mark(_WRITTEN)
        self._wait_for(_WRITTEN)
        names = files_of(self._work)
        blocks = manifest.blocks_of(self._work, names)
        share = manifest.share_of(blocks, self._rank, self._size)
        self._mark(_HASHED, manifest.hashes_of(self._work, share))
        if self._saved is not None:
            self._finish(self._saved, names, blocks)

    def _finish(
        self, saved: SavedDirectory, names: list[str], blocks: list[manifest.HashedBlock]
    ) -> None:
        """Write the manifest, and give the directory its name; rank 0 does it."""
        hashes: list[str] = []
        for mark in self._wait_for(_HASHED):
            hashes += json.loads(mark.read_text())
        (self._work / MANIFEST).write_bytes(manifest.manifest_of(names, blocks, hashes))
        sync(self._work / MANIFEST)
        for mark in self._work.glob(f"{RANK_MARK}*"):
            mark.unlink()
        saved.finish()

    def _mark(self, stage: str, content: Any = None) -> None:
        """Leave a mark for the other ranks; each appears with its whole content."""
        path = self._work / f"{RANK_MARK}{self._rank}.{stage}"
        draft = path.with_name(f"{path.name}.draft")
        try:
            draft.write_text(json.dumps(content))
            draft.rename(path)
        except OSError:
            if stage != _FAILED:  # that one has an error already, which `look` raises
                raise

    def _wait_for(self, stage: str) -> list[Path]:
        """The marks of all ranks, as soon as they are there."""
        marks = [self._work / f"{RANK_MARK}{rank}.{stage}" for rank in range(self._size)]
        end = time.monotonic() + _PATIENCE
        while not all(mark.exists() for mark in marks):
            cause = self._cause_elsewhere()
            if cause is not None:
                raise cause
            if time.monotonic() > end:
                missing = [rank for rank, mark in enumerate(marks) if not mark.exists()]
                raise UsageError(
                    f"{short_text(str(self._work))} cannot be finished: ranks {missing} have not "
                    f"{stage} their part within {_PATIENCE:.0f} seconds. Look at what they do."
                )
            time.sleep(_POLL)
        return marks


class _CancelledError(ShardproofError):
    """Another rank has failed."""


_unraised: set[BackgroundSave] = set()  # those that go on, or have an error that nothing raised
_looking: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()  # those that look before each step
_pending: "weakref.WeakKeyDictionary[nn.Module, BackgroundSave]" = weakref.WeakKeyDictionary()


@atexit.register
def _report_all() -> None:
    for save in list(_unraised):
        save.report()


def finish_all() -> None:
    """Wait for all saves of this thread, and raise the first error that nothing has raised.

    A call on ranks ends with it.

    Raises:
        BaseException: what went wrong.
    """
    # A copy first: threads of other saves change the set.
    saves = [save for save in tuple(_unraised) if save.is_of_this_thread]
    errors = [error for save in saves if (error := save.finish()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, _CancelledError)), errors[0])


def keep(model: nn.Module, save: BackgroundSave, optimizer: Optimizer | None) -> None:
    """Let the next save, load, wait or step of a model raise the error of a save.

    Args:
        model: the model that is saved.
        save: its save.
        optimizer: before each of its steps, all ranks look whether the save has failed.
    """
    _pending[model] = save
    if optimizer is not None and optimizer not in _looking:
        _looking.add(optimizer)
        optimizer.register_step_pre_hook(functools.partial(_look, weakref.ref(model)))


def _look(model: "weakref.ref[nn.Module]", *_: Any) -> None:
    """Look at the save of a model, if one goes on; called before a step of its optimizer."""
    saved = model()
    save = None if saved is None else _pending.get(saved)
    if saved is None or save is None:
        return
    is_over = True
    try:
        is_over = save.look(axis_of(saved))
    finally:
        if is_over:
            _pending.pop(saved, None)


def wait_for_pending(model: nn.Module, axis: Axis) -> None:
    """Wait for the save of a model that goes on; all ranks call it.

    Raises:
        ShardproofError: it has failed. All ranks raise, once.

    Comm:
        setup as `BackgroundSave.wait`.
    """
    save = _pending.pop(model, None)
    if save is not None:
        save.wait(axis)
