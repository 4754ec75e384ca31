"""Where every worker writes what it is doing, so that the launcher can say who waits for whom.

A small shared file, one row per rank: how many collectives the rank has begun, how many it has
ended, and the text of the last one. Over shared memory a rank writes only when it has waited for
long, so that it costs nothing else; the counts are right whenever it writes. A row has one writer.
The launcher reads it only when ranks have returned or failed and others have not, so a row torn in
mid-write is read again.
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
    """What one rank was doing when its row was read.

    Attributes:
        begun, ended: collectives so far.
        text: the last one that began; empty before the first.
    """

    begun: int
    ended: int
    text: str

    @property
    def is_waiting(self) -> bool:
        """True inside a collective."""
        return self.begun > self.ended


class StatusFile:
    """The rows of all ranks.

    Args:
        path: of a file that `StatusFile.create` made.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path, degree: int) -> "StatusFile":
        """A board of empty rows."""
        path.write_bytes(bytes(_ROW * degree))
        return cls(path)

    def begin(self, rank: int, count: int, text: str) -> None:
        """Rank `rank` is in the `count`th collective that it has begun, or waits in it again."""
        start = rank * _ROW
        data = text.encode()[: _ROW - _TEXT]
        self._map[start + _TEXT : start + _TEXT + len(data)] = data
        _LENGTH.pack_into(self._map, start + _COUNTS.size, len(data))
        _, ended = _COUNTS.unpack_from(self._map, start)
        _COUNTS.pack_into(self._map, start, count, min(ended, count - 1))

    def end(self, rank: int) -> None:
        """Rank `rank` has left the collective that it was in."""
        begun, _ = _COUNTS.unpack_from(self._map, rank * _ROW)
        _COUNTS.pack_into(self._map, rank * _ROW, begun, begun)

    def read(self, rank: int) -> RankStatus:
        """What rank `rank` is doing."""
        start = rank * _ROW
        begun, ended = _COUNTS.unpack_from(self._map, start)
        (length,) = _LENGTH.unpack_from(self._map, start + _COUNTS.size)
        data = self._map[start + _TEXT : start + _TEXT + length]
        return RankStatus(begun, ended, data.decode(errors="replace"))

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
