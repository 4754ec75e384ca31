"""Get the text of an exception safely: its `__str__` may be user code that fails or hangs.

A rank that has failed must be able to report it. So the text is made in a separate thread with a
short timeout, and a long text is shortened.
"""

import ctypes
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

LONGEST_TEXT = 4_000  # characters of the text of one exception
LONGEST_TRACE = 60_000  # characters of a traceback, which contains the text again
_PATIENCE = 2.0  # seconds

T = TypeVar("T")


class TooLong(Exception):  # noqa: N818 - nothing is wrong yet: somebody has waited long enough
    """A call did not end within its timeout."""


class _GivenUp(SystemExit):
    """Raised in a thread whose call has timed out."""


def within(seconds: float, do: Callable[[], T]) -> T:
    """Run `do()` in a separate thread, and return or raise its outcome.

    Raises:
        TooLong: it did not end in time. If it runs Python code, it is stopped.
    """
    answers: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((True, do()))
        except BaseException as error:
            answers.put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        is_done, outcome = answers.get(timeout=min(seconds, threading.TIMEOUT_MAX))
    except queue.Empty:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_GivenUp)
        )
        raise TooLong(f"it was not over within {seconds:g} s") from None
    if is_done:
        return outcome  # type: ignore[return-value]
    assert isinstance(outcome, BaseException)  # noqa: S101 - put there above
    raise outcome


@dataclass(frozen=True)
class ErrorText:
    """The text and traceback of an exception.

    Attributes:
        text: its type and message, as "ValueError: bad luck".
        trace: its traceback as Python prints it.
        problem: why the message is not available; empty if it is.
    """

    text: str
    trace: str
    problem: str


def describe_error(error: BaseException, trace: TracebackType | None = None) -> ErrorText:
    """The text and traceback of `error`; never fails, and ends soon."""
    text, problem = _message(error)
    if not problem:
        traceback_text, problem_of_trace = text_or_problem(
            lambda: "".join(traceback.format_exception(type(error), error, trace)), LONGEST_TRACE
        )
        if not problem_of_trace:
            return ErrorText(text, traceback_text, "")
    # Without the errors that caused it, whose texts may fail.
    frames = "".join(traceback.format_tb(trace))
    traceback_text = f"Traceback (most recent call last):\n{frames}{text}\n"
    return ErrorText(text, cut(traceback_text, LONGEST_TRACE), problem)


def text_of(error: BaseException) -> str:
    """The type and message of `error`; never fails, and ends soon."""
    return _message(error)[0]


def _message(error: BaseException) -> tuple[str, str]:
    """The type and message of `error`, and why the message is not available (or "")."""
    message, problem = text_or_problem(lambda: str(error))
    if problem:
        message = f"(its text is not available: {problem})"
    name = type(error).__name__
    return (f"{name}: {message}" if message else name), problem


def text_or_problem(make: Callable[[], str], longest: int = LONGEST_TEXT) -> tuple[str, str]:
    """The shortened text of `make()` and ""; or "" and why the text is not available."""
    try:
        return within(_PATIENCE, lambda: cut(make(), longest)), ""
    except TooLong:
        return "", f"its __str__ was not over within {_PATIENCE:g} s"
    except BaseException as raised:  # the user's code may raise anything, also SystemExit
        return "", f"its __str__ raised {type(raised).__name__}"


def cut(text: str, longest: int) -> str:
    """`text`, without its middle if it is too long.

    >>> cut("abcdefgh", 4)
    'ab ... (4 characters left out) ... gh'
    """
    if len(text) <= longest:
        return text
    half = longest // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]} ... ({left_out:,} characters left out) ... {text[-half:]}"
