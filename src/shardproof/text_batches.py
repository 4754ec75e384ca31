"""`TextBatches`: batches of a text, which follow from the seed and the step alone."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardproof import files
from shardproof.checked_values import LARGEST_SEED, checked_whole
from shardproof.errors import UsageError
from shardproof.numerics.random import generator
from shardproof.wording import error_words, short_repr, short_text

NUM_BYTES = 256
_LARGEST_FILE = 1 << 34  # bytes
_WAY_OUT = "Name a text file."
_NOTHING = torch.empty(0, dtype=torch.uint8)


class TextBatches:
    """Batches of tokens, drawn from text files by position.

    The batch of a step follows from the seed and the step. So a resumed run asks for its next step,
    and no position in the data is saved.

    Args:
        text_files: paths, in the order in which they are joined.
        rows: rows of a batch.
        length: tokens of a row.
        seed: seed of the draws.
        tokenizer: a tokenizer of transformers; without one, a token is a byte of the file.

    Attributes:
        tokens: (N,), Replicate, uint8 or int32: the tokens of all files.
        digest: SHA-256 of the tokens, as hexadecimal digits.

    Raises:
        UsageError: a file cannot be read, is not UTF-8 although there is a tokenizer, or the files
            have fewer tokens than a row.
    """

    def __init__(
        self,
        text_files: Iterable[str | os.PathLike[str]],
        *,
        rows: int,
        length: int,
        seed: int = 0,
        tokenizer: Any = None,
    ) -> None:
        self.rows = checked_whole(rows, "rows")
        self.length = checked_whole(length, "length")
        if tokenizer is not None and not callable(getattr(tokenizer, "encode", None)):
            raise UsageError(
                f"tokenizer={short_repr(tokenizer)} has no encode. Give a tokenizer of "
                "transformers, or None for bytes."
            )
        self._seed = checked_whole(seed, "seed", least=-LARGEST_SEED, most=LARGEST_SEED)
        parts = [_tokens_of(path, tokenizer) for path in _paths_of(text_files)]
        self.tokens = torch.cat(parts) if parts else _NOTHING
        if len(self.tokens) < self.length:
            raise UsageError(
                f"the text has {len(self.tokens)} tokens, and a row has {self.length}. Give more "
                "text, or shorter rows."
            )
        self.digest = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def batch(self, step: int) -> Tensor:
        """The batch of a step, each row from a place of its own.

        Args:
            step: number of steps before this one.

        Returns:
            (rows, length), int64, Replicate.

        Raises:
            UsageError: the step is no count of steps.
        """
        step = checked_whole(step, "step", least=0)
        draws = generator(seed=self._seed, name="text batch", step=step)
        starts = draws.integers(len(self.tokens) - self.length + 1, size=(self.rows, 1))
        return self.tokens[torch.from_numpy(starts) + torch.arange(self.length)].long()


def tokens_of_text(
    text: str, tokenizer: Any = None, *, add_special_tokens: bool = False
) -> list[int]:
    """The tokens of a text; without a tokenizer, its bytes in UTF-8.

    Args:
        text: the text.
        tokenizer: of transformers, or None.
        add_special_tokens: add those that the tokenizer puts around a text, such as a first token.

    Raises:
        UsageError: the text has bytes that are not UTF-8, and there is a tokenizer.
    """
    if tokenizer is None:
        return list(text.encode("utf-8", errors="surrogateescape"))
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(
            f"{short_repr(text)} is not UTF-8, and a tokenizer reads text. Convert it."
        )
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))


def check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    """Raise unless a model has a row of its embedding for every token.

    Args:
        tokens: (N,), Replicate, of `TextBatches`.
        vocabulary: number of tokens of the model.

    Raises:
        UsageError: it has not.
    """
    largest = NUM_BYTES - 1 if tokens.dtype == torch.uint8 else int(tokens.max())
    if largest >= vocabulary:
        kind = "bytes" if tokens.dtype == torch.uint8 else "of the tokenizer"
        raise UsageError(
            f"the tokens ({kind}) go up to {largest}, and the model has a vocabulary of "
            f"{vocabulary}. Use a model with a vocabulary of at least {largest + 1}."
        )


def _paths_of(text_files: Any) -> list[Path]:
    if isinstance(text_files, str | os.PathLike) or not isinstance(text_files, Iterable):
        raise UsageError(
            f"text_files={short_repr(text_files)} is not a list of paths. Write [path]."
        )
    return [files.path_of(path, what="a text file", way_out=_WAY_OUT) for path in text_files]


def _tokens_of(path: Path, tokenizer: Any) -> Tensor:
    what = f"the text {short_text(str(path))}"
    content = files.read_bytes(path, what=what, way_out=_WAY_OUT, largest=_LARGEST_FILE)
    if tokenizer is None:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else _NOTHING
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{what} is not UTF-8 ({error_words(error)}), and a tokenizer reads text. Convert it."
        ) from None
    return torch.tensor(tokens_of_text(text, tokenizer), dtype=torch.int32)
