"""Let all ranks raise the error that one of them has."""

from collections.abc import Iterator
from contextlib import contextmanager

from shardproof import files
from shardproof.axis import Axis
from shardproof.errors import ShardproofError, UsageError
from shardproof.wording import error_words


@contextmanager
def together(axis: Axis, what: str) -> Iterator[None]:
    """Run a block without collectives on all ranks; if it raises on one, all ranks raise.

    Args:
        axis: the ranks.
        what: what the block does, for messages ("writing DIRECTORY").

    Raises:
        ShardproofError: the block raised it on this rank, or on the first rank that has an error.
        UsageError: the block raised an OSError there, or something else on another rank.
        Exception: what the block raised on this rank.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    error: Exception | None = None
    try:
        yield
    except OSError as raised:
        error = UsageError(f"{what} failed{_place(raised)}: {files.why(raised)}.")
    except Exception as raised:  # the other ranks wait for this one, whatever it is
        error = raised
    errors = axis.gather_small(described(error, what), what=what)
    for rank, other in enumerate(errors):
        if other is not None:
            if rank == axis.rank and error is not None:
                raise error
            kind, message = other
            raise kind(message)


def described(error: Exception | None, what: str) -> tuple[type[ShardproofError], str] | None:
    """Class and message of an error for other ranks; None for none."""
    if error is None:
        return None
    if isinstance(error, ShardproofError):
        return type(error), str(error)
    return UsageError, f"{what} failed: {error_words(error)}."


def _place(error: OSError) -> str:
    return f" at {error.filename}" if isinstance(error.filename, str) else ""
