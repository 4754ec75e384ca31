"""Write whole tensors into safetensors files; each rank writes the bytes of its own part."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardproof.axis import Axis
from shardproof.checkpoint.entries import Entry
from shardproof.index_runs import indices, join, runs_up_to, take
from shardproof.leaves import Layout, share
from shardproof.recut import swap
from shardproof.safetensors_file import (
    BUFFER,
    NAMES,
    StoredTensor,
    bytes_of,
    has_long_runs,
    header_of,
    pieces_of,
    write_from,
)
from shardproof.transport.base import Call
from shardproof.units import common_runs

LARGEST_FILE = 5_000_000_000  # bytes of tensors, as of transformers (max_shard_size)


@dataclass(frozen=True)
class FileLayout:
    """One file of a checkpoint.

    Attributes:
        name: name of the file.
        header: its first bytes.
        tensors: the place of each tensor, in the order of their bytes.
        num_bytes: size of the file.
    """

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]
    num_bytes: int


def divide_into_files(
    entries: Sequence[Entry], stem: str, *, largest: int = LARGEST_FILE
) -> tuple[FileLayout, ...]:
    """Divide whole tensors into files, the same at every degree.

    A file takes tensors in their order until the next one would make it larger than `largest`.
    Within a file wider dtypes come first, so that each tensor is aligned.

    Args:
        entries: the tensors.
        stem: the files are called `STEM.safetensors`, or `STEM-00001-of-00002.safetensors`.
        largest: most bytes of tensors in one file, unless one tensor has more.
    """
    sizes = [math.prod(each.layout.shape) * each.tensor.dtype.itemsize for each in entries]
    runs = list(runs_up_to(sizes, largest)) or [range(0)]  # a file also for no tensors
    groups = [entries[run.start : run.stop] for run in runs]
    count = len(groups)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )
    return tuple(_file_layout(name, group) for name, group in zip(names, groups, strict=True))


def _file_layout(name: str, entries: Sequence[Entry]) -> FileLayout:
    ordered = sorted(entries, key=lambda entry: (-entry.tensor.dtype.itemsize, entry.name))
    header = header_of([(each.name, each.tensor.dtype, each.layout.shape) for each in ordered])
    start = len(header)
    tensors = []
    for entry in ordered:
        kind = NAMES[entry.tensor.dtype]
        stored = StoredTensor(entry.name, kind, entry.layout.shape, start)
        tensors.append(stored)
        start += stored.num_bytes
    return FileLayout(name, header, tuple(tensors), start)


def create(folder: Path, layouts: Iterable[FileLayout]) -> None:
    """Make the files at their full size with their headers; called by one rank.

    Raises:
        OSError: the disk has too little room, or the files cannot be written.
    """
    for each in layouts:
        descriptor = os.open(
            folder / each.name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644
        )
        try:
            os.posix_fallocate(descriptor, 0, each.num_bytes)
            write_from(descriptor, 0, memoryview(each.header))
        finally:
            os.close(descriptor)


class PartWriter:
    """Writes this rank's bytes of one file.

    An error is kept until `finish`: the rank goes on to exchange blocks, for which
    the other ranks wait.

    Args:
        path: path of the file, which `create` has made.
        axis: the ranks that share the tensors.

        opens: whether the file is opened.

    Attributes:
        error: the first error, or None.
    """

    def __init__(self, path: Path, axis: Axis, *, opens: bool = True) -> None:
        self.error: OSError | RuntimeError | None = None
        self._axis = axis
        self._path = path
        self._descriptor: int | None = None
        try:
            if opens:
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            self.error = error

    def finish(self) -> None:
        """Let the disk have what was written.

        Raises:
            OSError: something could not be written.
        """
        if self.error is None and self._descriptor is not None:
            os.fsync(self._descriptor)
        if isinstance(self.error, OSError):
            raise OSError(self.error.errno, self.error.strerror, str(self._path))
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @torch.no_grad()
    def write(self, stored: StoredTensor, entry: Entry) -> None:
        """Write this rank's part of one tensor; all ranks call it with the same tensors in order.

        Args:
            stored: the place in the file.
            entry: the tensor.

        Comm:
            setup none if a rank's runs of bytes are long (the tensor is cut along dim 0, or its
            runs have 64 KiB); else one exchange of (rows, size) for every 8 MiB, after which each
            rank writes whole rows.
        """
        layout = entry.layout
        x = entry.tensor.detach()
        if layout.dim is None or self._axis.size == 1:
            self._write_share(stored, x)
            return
        num_runs = sum(len(layout.of(rank).owned_runs) for rank in range(self._axis.size))
        inner = math.prod(layout.shape[layout.dim + 1 :])
        rows = math.prod(layout.shape[: layout.dim])
        if not rows * inner:
            return
        part = x.reshape(rows, -1, inner)
        if has_long_runs(layout.shape, layout.dim, num_runs, stored.item_bytes):
            runs = _paired(layout.owned_runs, layout.owned_places)
            for start, row, place in pieces_of(stored, layout.dim, runs, most=BUFFER):
                self._write(start, part[row, place])
        else:
            self._write_rows(stored, layout, part)

    def _write_share(self, stored: StoredTensor, x: Tensor) -> None:
        """Write one contiguous share of a tensor that every rank holds whole."""
        flat = x.reshape(-1)
        mine = share(flat.numel(), self._axis.size)[self._axis.rank]
        step = BUFFER // stored.item_bytes
        for first in range(mine.start, mine.stop, step):
            block = flat[first : min(first + step, mine.stop)]
            self._write(stored.start + first * stored.item_bytes, block)

    def _write_rows(self, stored: StoredTensor, layout: Layout, part: Tensor) -> None:
        """Exchange blocks, so that each rank has whole rows, and write those.

        Args:
            stored: the place in the file.
            layout: layout of the tensor on this rank.
            part: (rows, held, inner), what this rank holds.
        """
        axis, dim = self._axis, layout.dim or 0
        rows, _, inner = part.shape
        every_run = [layout.of(rank).owned_runs for rank in range(axis.size)]
        widths = [sum(map(len, runs)) for runs in every_run]
        size = layout.shape[dim]
        step = max(axis.size, BUFFER // max(1, size * inner * stored.item_bytes))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            shares = share(count, axis.size)
            owned = take(part[first : first + count], 1, layout.owned_places)
            blocks = [
                owned[run.start : run.stop].clone(memory_format=torch.contiguous_format).view(-1)
                for run in shares
            ]
            height = len(shares[axis.rank])
            call = Call("exchange", "setup", stored.name, (count, size * inner), part.dtype, "save")
            got = swap(blocks, [height * width * inner for width in widths], axis, call)
            parts = [
                each.view(height, width, inner) for each, width in zip(got, widths, strict=True)
            ]
            start = first + shares[axis.rank].start
            self._write(
                stored.start + start * size * inner * stored.item_bytes, join(parts, 1, every_run)
            )

    def _write(self, start: int, x: Tensor) -> None:
        if self.error is not None or not x.numel():
            return
        try:
            self._put(start, x)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if memory is short
            self.error = error

    def _put(self, start: int, x: Tensor) -> None:
        """Write the elements of a tensor at an offset."""
        if self._descriptor is not None:
            write_from(self._descriptor, start, bytes_of(x.cpu().contiguous()))


def _paired(runs: Sequence[range], places: Sequence[slice]) -> list[tuple[range, int]]:
    """Runs of the whole, each with its first position in the part, from runs of both.

    >>> _paired([range(4, 6), range(8, 9)], [slice(2, 5)])
    [(range(4, 6), 2), (range(8, 9), 4)]
    """
    if not runs:
        return []
    pairs = common_runs(indices(runs).numpy(), indices(places).numpy())
    return [(range(whole.start, whole.stop), part.start) for whole, part in pairs]
