"""Collect the failures of the ranks, and choose the one error that the caller gets.

One failure causes others: the other ranks lose a connection, or wait for a rank that never comes.
These are symptoms, and the error raised is always that of the cause.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shardproof.error_text import describe_error, text_or_problem
from shardproof.errors import RankError, ShardproofError
from shardproof.transport.base import PeerError

_HERE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Failure:
    """Why one rank did not return.

    Attributes:
        rank: the rank.
        summary: continues the sentence "rank 1 of 3 ...".
        is_symptom: whether another rank's failure caused it.
        is_death: whether its process has ended.
        error: the exception; None if there is none, or if it cannot be pickled.
        trace: the traceback as text; empty if there is none.
    """

    rank: int
    summary: str
    is_symptom: bool = False
    is_death: bool = False
    error: BaseException | None = None
    trace: str = ""


def failure_of(rank: int, error: BaseException) -> Failure:
    """The failure of a rank that raised; returns soon, whatever the error's own code does."""
    try:
        return _failure_with_text(rank, error)
    except BaseException as raised:  # `__class__` and the metaclass are the user's code too
        kind = type.__getattribute__(type(error), "__name__")
        why = type.__getattribute__(type(raised), "__name__")
        return Failure(rank, f"raised {kind}, of which nothing can be told (looking raised {why})")


def _failure_with_text(rank: int, error: BaseException) -> Failure:
    description = describe_error(error, _below_engines(error))
    summary = f"raised {description.text}"
    if isinstance(error, SystemExit) and not description.problem:
        summary = f"left early: it called sys.exit({text_or_problem(lambda: repr(error.code))[0]})"
    return Failure(
        rank,
        summary,
        is_symptom=_has_symptom(error),
        # If the error has no usable text, printing it later would hang or fail as well.
        error=None if description.problem else error,
        trace=description.trace,
    )


def verdict(failures: Sequence[Failure], degree: int) -> ShardproofError:
    """The error to raise: that of the cause, or of the lowest rank if there are several causes.

    The death of a process comes before the errors of other ranks, because a lost connection may
    look like any error. shardproof's own errors are raised as they are, others as RankError.
    """
    cause = min(failures, key=lambda f: (f.is_symptom, not f.is_death, f.rank))
    where = f"rank {cause.rank} of {degree}"
    error = cause.error
    if isinstance(error, ShardproofError) and not isinstance(error, PeerError):
        # An error from another process has lost its traceback; one from this process has it.
        trace = "." if error.__traceback__ is not None else f":\n{cause.trace}"
        error.add_note(f"This was raised on {where}{trace}")
        return error
    if isinstance(error, PeerError):
        symptom = RankError(str(error), rank=error.rank)
        symptom.add_note(f"This was noticed by {where}:\n{cause.trace}")
        return symptom
    message = f"{where} {cause.summary}"
    rank_error = RankError(
        f"{message}\n\n{cause.trace}" if cause.trace else message, rank=cause.rank
    )
    rank_error.__cause__ = error
    return rank_error


def _below_engines(error: BaseException) -> TracebackType | None:
    """The traceback from the user's function on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_HERE):
        trace = trace.tb_next
    return trace or error.__traceback__


def _has_symptom(error: BaseException | None) -> bool:
    """Whether `error` is a symptom or was caused by one; a group, if all its errors are."""
    visited = set()
    while error is not None and id(error) not in visited:
        if isinstance(error, PeerError):
            return True
        if isinstance(error, BaseExceptionGroup) and all(map(_has_symptom, error.exceptions)):
            return True
        visited.add(id(error))
        error = error.__cause__ or error.__context__
    return False
