"""What an exception says, although its `__str__` is the user's code: it may fail, wait or be long.

A rank that has failed must be able to say so. So the text is made in a thread of its own, for which
nobody waits longer than a moment, and what is too long is cut.
"""

import ctypes
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

LONGEST_TEXT = 4_000  # characters of what one exception says
LONGEST_TRACE = 60_000  # and of a traceback, which has the text again
_PATIENCE = 2.0  # seconds

T = TypeVar("T")


class TooLong(Exception):  # noqa: N818 - nothing is wrong yet: somebody has waited long enough
    """What was asked for has not come in time."""


class _GivenUp(SystemExit):
    """Raised in a thread for which nobody waits any more."""


def within(seconds: float, do: Callable[[], T]) -> T:
    """What `do()` returns or raises; it runs in a thread of its own.

    Raises:
        TooLong: it was not over in time. If it runs Python code, it is stopped.
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
        is_done, found = answers.get(timeout=min(seconds, threading.TIMEOUT_MAX))
    except queue.Empty:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_GivenUp)
        )
        raise TooLong(f"it was not over within {seconds:g} s") from None
    if is_done:
        return found  # type: ignore[return-value]
    assert isinstance(found, BaseException)  # noqa: S101 - put there above
    raise found


@dataclass(frozen=True)
class ErrorText:
    """What can be told of an exception.

    Attributes:
        text: its type and what it says, as "ValueError: bad luck".
        trace: its traceback as Python prints it.
        problem: why what it says cannot be had; empty if it can.
    """

    text: str
    trace: str
    problem: str


def describe_error(error: BaseException, trace: TracebackType | None = None) -> ErrorText:
    """What can be told of `error`; never fails, and is soon done."""
    text, problem = _message(error)
    if not problem:
        printed, problem_of_trace = text_or_problem(
            lambda: "".join(traceback.format_exception(type(error), error, trace)), LONGEST_TRACE
        )
        if not problem_of_trace:
            return ErrorText(text, printed, "")
    # Without the errors that it came from, whose texts may be what fails.
    frames = "".join(traceback.format_tb(trace))
    printed = f"Traceback (most recent call last):\n{frames}{text}\n"
    return ErrorText(text, cut(printed, LONGEST_TRACE), problem)


def text_of(error: BaseException) -> str:
    """The type of `error` and what it says; never fails, and is soon done."""
    return _message(error)[0]


def _message(error: BaseException) -> tuple[str, str]:
    """The type of `error` and what it says, and why that cannot be had; empty if it can."""
    said, problem = text_or_problem(lambda: str(error))
    if problem:
        said = f"(what it says cannot be had: {problem})"
    name = type(error).__name__
    return (f"{name}: {said}" if said else name), problem


def text_or_problem(make: Callable[[], str], longest: int = LONGEST_TEXT) -> tuple[str, str]:
    """What `make()` returns, cut, and the empty string; or nothing, and why it cannot be had."""
    try:
        return within(_PATIENCE, lambda: cut(make(), longest)), ""
    except TooLong:
        return "", f"its __str__ was not over within {_PATIENCE:g} s"
    except BaseException as raised:  # the user's code may raise anything, SystemExit too
        return "", f"its __str__ raised {type(raised).__name__}"


def cut(text: str, longest: int) -> str:
    """`text`, without its middle if it is longer.

    >>> cut("abcdefgh", 4)
    'ab ... (4 characters left out) ... gh'
    """
    if len(text) <= longest:
        return text
    half = longest // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]} ... ({left_out:,} characters left out) ... {text[-half:]}"
