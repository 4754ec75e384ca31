"""The manifest of a checkpoint: SHA-256 of every block of every file, and one of them all.

The bytes of a file are divided into blocks at fixed places, which do not depend on the degree: the
header of a safetensors file, and each tensor in blocks of 16 MiB. Other files are one tensor
without a name. So ranks hash side by side, and a damaged block has the name of its tensor.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shardproof import files
from shardproof.checkpoint.directory import LARGEST_JSON, MANIFEST, files_of
from shardproof.errors import UsageError
from shardproof.safetensors_file import read_header, read_into
from shardproof.wording import few, short_repr, short_text

VERSION = 1
BLOCK = 16 << 20  # bytes
_READ = 1 << 20  # bytes that are read at once
_AGAIN = "Fetch or save the checkpoint again."


class HashedBlock(NamedTuple):
    """A run of bytes of a file.

    Attributes:
        file: name of the file.
        tensor: name of the tensor; "" for the bytes before the tensors, and for other files.
        start: offset of the first byte.
        stop: offset after the last byte.
    """

    file: str
    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Damage:
    """What does not agree with the manifest.

    Attributes:
        file: name of the file.
        tensor: name of the tensor, or "".
        reason: in words.
    """

    file: str
    tensor: str
    reason: str

    def __str__(self) -> str:
        tensor = f"tensor {self.tensor!r} in " if self.tensor else ""
        return f"{tensor}{self.file}: {self.reason}"


def blocks_of(folder: Path, names: Sequence[str]) -> list[HashedBlock]:
    """The blocks of the files of a directory.

    Args:
        folder: the directory.
        names: the files, each of which is there.

    Raises:
        UsageError: a safetensors file is damaged so that its tensors cannot be found.
        OSError: a file cannot be read.
    """
    blocks: list[HashedBlock] = []
    for name in names:
        path = folder / name
        size = path.stat().st_size
        if path.suffix != ".safetensors":
            blocks += _cut(name, "", 0, size)
            continue
        tensors = list(read_header(path).values())
        start = tensors[0].start if tensors else size
        blocks += _cut(name, "", 0, start)
        for stored in tensors:
            blocks += _cut(name, stored.name, stored.start, stored.start + stored.num_bytes)
    return blocks


def _cut(file: str, tensor: str, start: int, stop: int) -> Iterator[HashedBlock]:
    for first in range(start, stop, BLOCK):
        yield HashedBlock(file, tensor, first, min(first + BLOCK, stop))


def hashes_of(folder: Path, blocks: Sequence[HashedBlock]) -> list[str]:
    """SHA-256 of each block, in hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    hashes = []
    descriptors: dict[str, int] = {}
    buffer = memoryview(bytearray(_READ))
    try:
        for block in blocks:
            if block.file not in descriptors:
                path = folder / block.file
                descriptors[block.file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            digest = hashlib.sha256()
            for start in range(block.start, block.stop, _READ):
                part = buffer[: min(_READ, block.stop - start)]
                read_into(descriptors[block.file], start, part)
                digest.update(part)
            hashes.append(digest.hexdigest())
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return hashes


def share_of(blocks: Sequence[HashedBlock], rank: int, size: int) -> Sequence[HashedBlock]:
    """The blocks that one rank hashes: consecutive ones, with about as many bytes on each rank."""
    total = sum(block.stop - block.start for block in blocks)
    shares: list[list[HashedBlock]] = [[] for _ in range(size)]
    done = 0
    for block in blocks:
        shares[min(size - 1, done * size // max(1, total))].append(block)
        done += block.stop - block.start
    return shares[rank]


def manifest_of(
    names: Sequence[str], blocks: Sequence[HashedBlock], hashes: Sequence[str]
) -> bytes:
    """The text of a manifest.

    Args:
        names: all files.
        blocks: all blocks of all files.
        hashes: of each block.
    """
    listed: dict[str, dict[str, Any]] = {name: {"bytes": 0, "tensors": {}} for name in names}
    for block, digest in zip(blocks, hashes, strict=True):
        entry = listed[block.file]
        entry["bytes"] = block.stop
        entry["tensors"].setdefault(block.tensor, []).append(digest)
    content = {"version": VERSION, "block_bytes": BLOCK, "files": listed}
    return (json.dumps({**content, "root": root_of(content)}, indent=1) + "\n").encode()


def root_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its root: of its JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in content.items() if key != "root"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a directory, as JSON.

    Raises:
        UsageError: there is none, it cannot be read, or its own hash does not agree.
    """
    what = short_text(str(folder / MANIFEST))
    content = files.read_json(folder / MANIFEST, what=what, way_out=_AGAIN, largest=LARGEST_JSON)
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is int and version > VERSION:
        raise UsageError(
            f"{what} has version {version}, and this shardproof reads up to {VERSION}. Install a "
            "newer shardproof."
        )
    if (
        version != VERSION
        or content.get("block_bytes") != BLOCK
        or not isinstance(content.get("files"), dict)
    ):
        raise UsageError(f"{what} is no manifest of a checkpoint: {short_repr(content)}. {_AGAIN}")
    if content.get("root") != root_of(content):
        raise UsageError(f"{what} is damaged: its root hash is not that of its lines. {_AGAIN}")
    for name, entry in content["files"].items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
            raise UsageError(f"{what} names {short_repr(name)}, which is outside the directory.")
        if not _is_entry(entry):
            raise UsageError(f"{what} has {short_repr(entry)} for {short_repr(name)}. {_AGAIN}")
    return content


def _is_entry(entry: Any) -> bool:
    """Whether the manifest has the size of a file, and hashes by tensor."""
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
        return False
    tensors = entry.get("tensors")
    return isinstance(tensors, dict) and all(
        isinstance(hashes, list) and all(isinstance(each, str) for each in hashes)
        for hashes in tensors.values()
    )


def check_small(folder: Path) -> str:
    """Compare sizes, headers and small files of a checkpoint with its manifest.

    Returns:
        The root hash of the manifest.

    Raises:
        UsageError: something does not agree; it names the file.
    """
    content = read_manifest(folder)
    for name, entry in content["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                reason = f"has {size:,} bytes, and {entry['bytes']:,} in the manifest"
                raise UsageError(f"{short_text(str(path))} {reason}. {_AGAIN}")
            blocks = [block for block in blocks_of(folder, [name]) if not block.tensor]
            hashes = hashes_of(folder, blocks) if size <= BLOCK or len(blocks) == 1 else []
        except OSError as error:
            raise UsageError(
                f"{short_text(str(path))}, which the manifest lists, cannot be read: "
                f"{files.why(error)}. {_AGAIN}"
            ) from None
        if hashes and hashes != entry["tensors"].get(""):
            raise UsageError(
                f"{short_text(str(path))} is not the file that the manifest lists: another "
                f"SHA-256. {_AGAIN}"
            )
    root: str = content["root"]
    return root


def find_damage(
    folder: Path, *, workers: int = 2, progress: Callable[[int, int], None] | None = None
) -> list[Damage]:
    """Compare every file of a checkpoint with its manifest.

    Args:
        folder: the directory.
        workers: number of threads that hash.
        progress: is called with the number of hashed bytes and of all bytes.

    Returns:
        What does not agree, the first damaged block of each tensor.

    Raises:
        UsageError: as `read_manifest`.
    """
    content = read_manifest(folder)
    others = sorted(set(files_of(folder)) - set(content["files"]))
    damages = [Damage(name, "", "it is not in the manifest") for name in others]
    blocks: list[HashedBlock] = []
    expected: list[str] = []
    for name, entry in content["files"].items():
        try:
            mine = blocks_of(folder, [name])
        except (UsageError, OSError) as error:
            why = files.why(error) if isinstance(error, OSError) else str(error)
            damages.append(Damage(name, "", why))
            continue
        counts: dict[str, int] = {}
        for block in mine:
            counts[block.tensor] = counts.get(block.tensor, 0) + 1
        theirs = {tensor: len(hashes) for tensor, hashes in entry["tensors"].items()}
        if counts != theirs:
            differing = [t for t in {**theirs, **counts} if theirs.get(t) != counts.get(t)]
            reason = f"its tensors are not those of the manifest ({few(differing, most=3)})"
            damages.append(Damage(name, "", reason))
            continue
        blocks += mine
        expected += [digest for tensor in counts for digest in entry["tensors"][tensor]]
    hashes = _hash_all(folder, blocks, workers, progress)
    found: set[tuple[str, str]] = set()
    for block, digest, wanted in zip(blocks, hashes, expected, strict=True):
        if digest != wanted and (block.file, block.tensor) not in found:
            found.add((block.file, block.tensor))
            where = f"bytes {block.start:,} to {block.stop:,} have another SHA-256"
            damages.append(Damage(block.file, block.tensor, where))
    return damages


def _hash_all(
    folder: Path,
    blocks: Sequence[HashedBlock],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    total = sum(block.stop - block.start for block in blocks)
    done, hashes = 0, []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda block: hashes_of(folder, [block])[0], blocks)
        for block, digest in zip(blocks, results, strict=True):
            hashes.append(digest)
            done += block.stop - block.start
            if progress is not None:
                progress(done, total)
    return hashes
