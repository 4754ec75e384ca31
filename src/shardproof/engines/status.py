"""`StatusFile`: the collectives of every worker, so that the launcher can say who waits for whom.

A small shared file with one row per rank: how many collectives the rank has begun, how many it has
ended, and the text of the last one. With shared memory, a rank writes only after a long wait, so
that a fast exchange costs nothing; the counts are right whenever it writes. A row has one writer.
The launcher reads only when some ranks have returned or failed and others have not. A row that it
reads in the middle of a write is read again.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_ROW = 1024
_COUNTS = struct.Struct("=qq")
_LENGTH = struct.Struct("=q")
_TEXT = _COUNTS.size + _LENGTH.size


@dataclass(frozen=True)
class RankStatus:
    """The state of one rank when its row was read.

    Attributes:
        begun, ended: number of collectives so far.
        text: the last collective that began; empty before the first.
    """

    begun: int
    ended: int
    text: str

    @property
    def is_waiting(self) -> bool:
        """Whether the rank is inside a collective."""
        return self.begun > self.ended


class StatusFile:
    """The rows of all ranks.

    Args:
        path: path of a file that `StatusFile.create` made.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path, degree: int) -> "StatusFile":
        """Create a file of empty rows."""
        path.write_bytes(bytes(_ROW * degree))
        return cls(path)

    def begin(self, rank: int, count: int, text: str) -> None:
        """Write that rank `rank` is in its `count`th collective."""
        start = rank * _ROW
        data = text.encode()[: _ROW - _TEXT]
        self._map[start + _TEXT : start + _TEXT + len(data)] = data
        _LENGTH.pack_into(self._map, start + _COUNTS.size, len(data))
        _, ended = _COUNTS.unpack_from(self._map, start)
        _COUNTS.pack_into(self._map, start, count, min(ended, count - 1))

    def end(self, rank: int) -> None:
        """Write that rank `rank` has left its collective."""
        begun, _ = _COUNTS.unpack_from(self._map, rank * _ROW)
        _COUNTS.pack_into(self._map, rank * _ROW, begun, begun)

    def read(self, rank: int) -> RankStatus:
        """Read the state of rank `rank`."""
        start = rank * _ROW
        begun, ended = _COUNTS.unpack_from(self._map, start)
        (length,) = _LENGTH.unpack_from(self._map, start + _COUNTS.size)
        data = self._map[start + _TEXT : start + _TEXT + length]
        return RankStatus(begun, ended, data.decode(errors="replace"))

    def close(self) -> None:
        """Close the file."""
        self._map.close()
