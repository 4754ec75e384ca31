"""Let all ranks raise the error that one of them has."""

from collections.abc import Iterator
from contextlib import contextmanager

from shardproof import files
from shardproof.axis import Axis
from shardproof.errors import ShardproofError, UsageError


@contextmanager
def together(axis: Axis, what: str) -> Iterator[None]:
    """Run a block without collectives on all ranks; if it raises on one, all ranks raise that.

    Args:
        axis: the ranks.
        what: what the block does, for messages ("writing DIRECTORY").

    Raises:
        ShardproofError: the block raised it on this rank, or on the first rank that has an error.
        UsageError: the block raised an OSError there.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    error: Exception | None = None
    try:
        yield
    except ShardproofError as raised:
        error = raised
    except OSError as raised:
        error = UsageError(f"{what} failed{_place(raised)}: {files.why(raised)}.")
    described = None if error is None else (type(error), str(error))
    errors = axis.gather_small(described, what=what)
    for rank, other in enumerate(errors):
        if other is not None:
            if rank == axis.rank and error is not None:
                raise error from error.__cause__
            kind, message = other
            raise kind(message)


def _place(error: OSError) -> str:
    return f" at {error.filename}" if isinstance(error.filename, str) else ""
