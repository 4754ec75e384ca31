"""The safetensors format: headers, and the bytes of a part of a tensor in a file.

A file has 8 bytes with the length of the header (little endian), the header in JSON, and the bytes
of the tensors one after the other (https://github.com/huggingface/safetensors, "Format"). The
library `safetensors` writes whole tensors. Here a rank reads and writes only its part.
"""

import itertools
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardproof import files
from shardproof.errors import UsageError
from shardproof.index_runs import take
from shardproof.leaves import Layout
from shardproof.wording import few, short_repr, short_text

# Name of a dtype in a header -> the dtype of torch.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Dtypes of formats that torch cannot hold, with their bytes: a file may have such tensors.
_OTHER_BYTES = {"U16": 2, "U32": 4, "U64": 8, "F8_E8M0": 1}
_FETCH = "Fetch the whole checkpoint."
_LARGEST_HEADER = 100_000_000  # bytes; the library refuses longer ones too
# Runs of at least so many bytes are read and written one by one; shorter ones by whole rows.
LONG_RUN = 64 << 10
BUFFER = 8 << 20  # bytes that are read, or exchanged, at once


@dataclass(frozen=True)
class StoredTensor:
    """Where a file has one tensor.

    Attributes:
        name: name of the tensor.
        kind: name of its dtype in the header ("F32").
        shape: its shape.
        start: offset of its first byte in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of torch, or None if torch has none."""
        return DTYPES.get(self.kind)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        dtype = self.dtype
        return _OTHER_BYTES[self.kind] if dtype is None else dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.item_bytes


class Piece(NamedTuple):
    """A run of bytes of a tensor in a file, and the same elements in a part of the tensor.

    Attributes:
        start: offset in the file.
        row: index of the row, if all dims before the cut one are flattened to one.
        place: slice along the cut dim of the part.
    """

    start: int
    row: int
    place: slice


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read which tensors a file has, and check that they fill it exactly.

    Args:
        path: path of the file.

    Returns:
        Name -> place, in the order of their bytes.

    Raises:
        UsageError: it is not a regular file, cannot be read, or is no whole safetensors file.
    """
    what = short_text(str(path))
    files.check_regular(path, what=what, way_out=_FETCH)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise _unreadable(
                    what, f"its first 8 bytes give no length of a header, of {size:,}"
                )
            header = file.read(length)
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {files.why(error)}. {_FETCH}") from None
    return _tensors(header, 8 + length, size, what)


def _unreadable(what: str, reason: str) -> UsageError:
    return UsageError(f"{what} cannot be read as safetensors: {reason}. {_FETCH}")


def _tensors(header: bytes, start: int, size: int, what: str) -> dict[str, StoredTensor]:
    try:
        entries = files.parse_json(header.decode("utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise _unreadable(
            what, f"its header is not JSON ({short_text(str(error), most=100)})"
        ) from None
    if not isinstance(entries, dict):
        raise _unreadable(what, f"its header is {short_repr(entries)}")
    entries.pop("__metadata__", None)
    places = []
    for name, entry in entries.items():
        stored, stop = _stored(name, entry, start, what)
        places.append((stored.start, stop, stored))
    places.sort(key=lambda each: each[:2])
    end = start
    for first, stop, stored in places:
        if first != end:
            raise _unreadable(
                what, f"the bytes of {short_repr(stored.name)} begin at {first}, not {end}"
            )
        end = stop
    if end != size:
        more = "fewer" if size < end else "more"
        raise _unreadable(what, f"it has {size:,} bytes, {more} than the {end:,} of its header")
    return {stored.name: stored for _, _, stored in places}


def _stored(name: str, entry: Any, start: int, what: str) -> tuple[StoredTensor, int]:
    """The place of one tensor, and the offset after it."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    kind: Any
    shape: Any
    offsets: Any
    kind, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(kind, str)
        or kind not in DTYPES | _OTHER_BYTES
        or not _are_sizes(shape)
        or not _are_sizes(offsets)
        or len(offsets) != 2
    ):
        raise _unreadable(what, f"its entry for {short_repr(name)} is {short_repr(entry)}")
    stored = StoredTensor(name, kind, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != stored.num_bytes:
        raise _unreadable(
            what,
            f"{short_repr(name)} with shape {short_repr(stored.shape)} and dtype {kind} needs "
            f"{stored.num_bytes:,} bytes, and has {offsets[1] - offsets[0]:,}",
        )
    return stored, start + offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(each) is int and each >= 0 for each in values)


def header_of(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The bytes of a file before those of its tensors.

    Args:
        tensors: name, dtype and shape, in the order of their bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def pieces_of(
    stored: StoredTensor, dim: int, runs: Sequence[tuple[range, int]], *, most: int | None = None
) -> Iterator[Piece]:
    """The runs of bytes of a part of a tensor.

    Args:
        stored: where the tensor is.
        dim: the dim along which the part has runs of the whole.
        runs: each run, and the position of its first index in the part.
        most: most bytes of one piece; runs of more are divided between indices. None: no limit.
    """
    item, size = stored.item_bytes, stored.shape[dim]
    inner = math.prod(stored.shape[dim + 1 :]) * item
    step = max(1, most // inner) if most is not None and inner else max(1, size)
    for row in range(math.prod(stored.shape[:dim])):
        for run, place in runs:
            for first in range(run.start, run.stop, step):
                length = min(step, run.stop - first)
                at = place + first - run.start
                start = stored.start + (row * size + first) * inner
                yield Piece(start, row, slice(at, at + length))


def with_places(runs: Sequence[range]) -> list[tuple[range, int]]:
    """Runs that lie one after the other in a part, each with its first position there."""
    starts = itertools.accumulate(map(len, runs), initial=0)
    return list(zip(runs, starts, strict=False))


def has_long_runs(shape: tuple[int, ...], dim: int, num_runs: int, item_bytes: int) -> bool:
    """Whether the runs of all ranks along a dim have on average at least `LONG_RUN` bytes.

    Args:
        shape: shape of the whole tensor.
        dim: the dim that is cut.
        num_runs: number of runs on all ranks together.
        item_bytes: bytes of one element.
    """
    row = math.prod(shape[dim:]) * item_bytes
    return math.prod(shape[:dim]) <= 1 or row >= LONG_RUN * max(1, num_runs)


@torch.no_grad()
def read_part(descriptor: int, stored: StoredTensor, layout: Layout, out: Tensor) -> None:
    """Read what a rank holds of a tensor, with at most `BUFFER` bytes (or one row) in between.

    Args:
        descriptor: the open file.
        stored: where it has the tensor.
        layout: how the tensor lies on this rank.
        out: (local_shape), of any dtype and device; it is filled, and the values are rounded to
            its dtype as `Tensor.to` rounds.

    Raises:
        UsageError: torch does not have the dtype of the file.
        OSError: the file cannot be read, or ends too early.
    """
    dtype = stored.dtype
    if dtype is None:
        raise UsageError(
            f"{short_repr(stored.name)} has dtype {stored.kind}, which torch does not have. "
            "Convert the tensor before."
        )
    if not out.is_contiguous():
        part = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        read_part(descriptor, stored, layout, part)
        out.copy_(part)
        return
    dim, runs = layout.dim, layout.held_runs
    if dim is None:
        numel = math.prod(stored.shape)
        stored = StoredTensor(stored.name, stored.kind, (numel,), stored.start)
        dim, runs = 0, (range(numel),)
    rows, inner = math.prod(stored.shape[:dim]), math.prod(stored.shape[dim + 1 :])
    if not rows * inner * sum(map(len, runs)):
        return
    target = out.view(rows, -1, inner)
    is_same = out.device.type == "cpu" and out.dtype == dtype
    if has_long_runs(stored.shape, dim, len(runs), stored.item_bytes):
        for start, row, place in pieces_of(
            stored, dim, with_places(runs), most=None if is_same else BUFFER
        ):
            to = target[row, place]
            block = to if is_same else torch.empty(to.shape, dtype=dtype)
            read_into(descriptor, start, bytes_of(block))
            if not is_same:
                to.copy_(block)
        return
    row_bytes = stored.shape[dim] * inner * stored.item_bytes
    step = max(1, BUFFER // row_bytes)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        block = torch.empty((count, stored.shape[dim], inner), dtype=dtype)
        read_into(descriptor, stored.start + first * row_bytes, bytes_of(block))
        target[first : first + count].copy_(take(block, 1, runs))


def bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat: Any = x.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def read_into(descriptor: int, start: int, buffer: memoryview) -> None:
    """Fill a buffer from an offset of a file.

    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            raise OSError(f"the file ends at byte {start + done}")
        done += count


def write_from(descriptor: int, start: int, buffer: memoryview) -> None:
    """Write a buffer at an offset of a file.

    Raises:
        OSError: it cannot be written (a full disk, for instance).
    """
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], start + done)


def check_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise unless the format has every dtype.

    Raises:
        UsageError: it names the tensors.
    """
    others = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in NAMES]
    if others:
        raise UsageError(
            f"cannot save {few(others, most=3)}: safetensors has no such dtype. Convert them to "
            f"one of: {', '.join(str(each).removeprefix('torch.') for each in NAMES)}."
        )
