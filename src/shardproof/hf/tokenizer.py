"""The tokenizer of a directory, if it has one."""

from pathlib import Path
from typing import Any

from shardproof.errors import UsageError
from shardproof.wording import error_words, short_text

# A directory with one of them has a tokenizer of transformers.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer that transformers saved in a directory; None if there is none.

    Nothing is fetched, and code in the directory is not run.

    Args:
        directory: a directory with config.json.

    Raises:
        UsageError: transformers cannot read it.
    """
    if not any((directory / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer  # noqa: PLC0415 - an optional extra

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library may raise anything for files that a user wrote
        raise UsageError(
            f"transformers cannot read the tokenizer of {short_text(str(directory))} "
            f"({error_words(error)}). Correct it, or remove its files to use bytes as tokens."
        ) from error
