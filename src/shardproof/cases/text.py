"""Real text that is on every machine: sources of Python's own standard library, byte by byte.

Nothing is downloaded and nothing depends on a tokenizer: a token is a byte. The sources are those
of the interpreter that runs, so other versions of Python give other text, other losses and other
hashes; the digest of the text goes into the report.
"""

import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardproof.cases.draws import generator
from shardproof.errors import UsageError

BYTES = 256  # tokens that a text can have

# Plain modules that Python 3.11, 3.12 and 3.13 have under one name: half a megabyte of prose in
# docstrings and of code.
MODULES = (
    "argparse.py", "bisect.py", "calendar.py", "configparser.py", "copy.py", "csv.py",
    "difflib.py", "fractions.py", "functools.py", "heapq.py", "numbers.py", "random.py",
    "shlex.py", "statistics.py", "textwrap.py", "tokenize.py", "weakref.py",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Some text as bytes.

    Attributes:
        content: (bytes,), uint8.
        digest: SHA-256 of them.
    """

    content: Tensor
    digest: str

    def __str__(self) -> str:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"{len(self.content):,} bytes of the Python {version} standard library, "
            f"sha256 {self.digest[:16]}"
        )

    def windows(
        self, *, seed: int, step: int, rows: int, length: int, vocabulary: int = BYTES
    ) -> Tensor:
        """Some runs of the text, from places keyed by seed and step, as tokens.

        Args:
            seed: of the case.
            step: of the training; each has other places.
            rows: how many runs.
            length: tokens of each.
            vocabulary: tokens that the reader knows.

        Returns:
            (rows, length), int64, Replicate.

        Raises:
            UsageError: the vocabulary has no token for every byte.
        """
        starts = torch.randint(
            len(self.content) - length + 1, (rows,), generator=generator(seed, f"text.step {step}")
        )
        places = starts[:, None] + torch.arange(length)
        return token_of_byte(vocabulary)[self.content[places].long()]


def token_of_byte(vocabulary: int) -> Tensor:
    """A token for every byte, (256,): spread over the whole vocabulary.

    Source code is ASCII, which has the lower half of the bytes alone: as they are, they would be
    rows of an embedding that the first ranks have. So the bits of a byte are read backwards, and
    the tokens stand as far apart as the vocabulary allows.

    Raises:
        UsageError: the vocabulary has fewer tokens than there are bytes.
    """
    if vocabulary < BYTES:
        raise UsageError(
            f"the text has {BYTES} tokens, one for each byte, and the model knows {vocabulary}. "
            f"Use a model with at least {BYTES} tokens."
        )
    backwards = [int(f"{byte:08b}"[::-1], 2) for byte in range(BYTES)]
    return torch.tensor(backwards) * vocabulary // BYTES


def standard_library() -> Text:
    """The sources of this interpreter's own standard library."""
    return _read(Path(sysconfig.get_paths()["stdlib"]))


@functools.cache  # ranks as threads read it, and nobody writes into it
def _read(directory: Path) -> Text:
    return read(directory)


def read(directory: Path, modules: Iterable[str] = MODULES) -> Text:
    """Some files of a directory, sorted by name and joined.

    Args:
        directory: where they are.
        modules: their names, in any order.

    Raises:
        UsageError: one of them cannot be read.
    """
    joined = b"".join(_bytes_of(directory / name) for name in sorted(modules))
    content = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    return Text(content, hashlib.sha256(joined).hexdigest())


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the text to learn from is Python's own standard library, and {path} cannot be read: "
            f"{error.strerror}. Use an interpreter that has its sources, for instance one in a "
            f"virtual environment made by python -m venv."
        ) from None
