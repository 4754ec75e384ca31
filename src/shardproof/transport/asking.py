"""Ask after a failure which ranks of several hosts still answer, and say so.

A rank that waits in shared memory asks too: the rank that it waits for may itself wait for another
host. All ranks are asked at once, within one deadline, on the sockets of `presence.py`.
"""

import contextlib
import enum
import errno
import hmac
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shardproof.transport.presence import TOKEN, Place, family_of, known_places
from shardproof.wording import error_words, few, run_words, short_text

PATIENCE = 2.0  # seconds within which a rank must answer

_AT_ONCE = 500  # connections; a process may often have 1,024 open files
_LONGEST = 4096  # bytes of an answer; longer ones are no answers of ours
_BEGUN = (0, errno.EINPROGRESS)
_REFUSED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE)
_UNREACHED = (
    errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN,
)  # fmt: skip


class State(enum.Enum):
    """What is known of a process that was asked; in the order in which it is told."""

    SILENT = 1
    ENDED = 2
    UNKNOWN = 3
    RUNS = 4


@dataclass(frozen=True)
class RankState:
    """What is known of the process of a rank.

    Attributes:
        place: of the rank.
        state: of its process.
        text: the collectives in which a process is that runs; for an unknown state the reason.
    """

    place: Place
    state: State
    text: str = ""


def where(places: Sequence[Place], rank: int) -> str:
    """Where the ranks are, for a message; "" if that is not known.

    Args:
        places: of all ranks of the axis.
        rank: this one.
    """
    if not places:
        return ""
    texts = [f"global rank {each.global_rank} on {each.host}" for each in places]
    others = texts[:rank] + texts[rank + 1 :]
    return f" ({texts[rank]}, with {few(others)})"


def who_answers(*, seconds: float = PATIENCE) -> tuple[str, Place | None]:
    """Ask the ranks of all hosts which of them still answer. It raises nothing.

    Args:
        seconds: within which a rank must answer.

    Returns:
        Sentences, after a blank, and the rank that is to blame, if it is one. Nothing where no axis
        of this process spans several hosts; then nobody is asked.
    """
    try:
        here, others = known_places()
        if here is None:
            return "", None
        found = ask(others, seconds=seconds)
    except Exception as error:  # the failure that is being told matters more
        return f" The other ranks could not be asked whether they run ({error_words(error)}).", None
    return f" {told(found, here.host, seconds=seconds)}", _blamed(found, here.host)


def _blamed(found: Sequence[RankState], host: str) -> Place | None:
    """The only rank that is lost, if it is not this host whose link is down."""
    silent = [each.place for each in found if each.state is State.SILENT]
    ended = [each.place for each in found if each.state is State.ENDED]
    lost = silent or ended
    return lost[0] if len(lost) == 1 and not _is_cut_off(found, host) else None


def _is_cut_off(found: Sequence[RankState], host: str) -> bool:
    """Whether no process of another host answers."""
    elsewhere = {each.state for each in found if each.place.host != host}
    return elsewhere == {State.SILENT}


def told(found: Sequence[RankState], host: str, *, seconds: float) -> str:
    """What was found, in sentences.

    Args:
        found: the states of all other ranks.
        host: name of this rank's host.
        seconds: for which they were waited for.
    """
    states = {each.state for each in found}
    clauses = [
        _clause(state, [each for each in found if each.state is state], seconds)
        for state in State
        if state in states
    ]
    sentences = ["; ".join(clauses)]
    if _is_cut_off(found, host):
        sentences.append(f"No other host answers: the link of this host, {host}, may be down")
    if states == {State.RUNS}:
        sentences.insert(0, "All other processes answer, so a rank is late or stuck")
    if State.RUNS in states and State.SILENT not in states:
        sentences.append(_calls([each for each in found if each.state is State.RUNS]))
    return " ".join(f"{each[0].upper()}{each[1:]}." for each in sentences)


def _clause(state: State, found: Sequence[RankState], seconds: float) -> str:
    ranks, is_one = _ranks([each.place for each in found]), len(found) == 1
    if state is State.SILENT:
        return f"{ranks} {'does' if is_one else 'do'} not answer within {seconds:g} s"
    if state is State.ENDED:
        process = "the process of" if is_one else "the processes of"
        return f"{process} {ranks} {'has' if is_one else 'have'} ended"
    if state is State.UNKNOWN:
        return f"{ranks} could not be asked ({found[0].text})"
    return f"{ranks} {'answers' if is_one else 'answer'}"


def _ranks(places: Sequence[Place]) -> str:
    """Global ranks by host, for a message."""
    by_host: dict[tuple[str, str], list[int]] = {}
    for each in places:
        by_host.setdefault((each.host, each.address), []).append(each.global_rank)
    hosts = []
    for (host, address), numbers in by_host.items():
        name = "global rank" if len(numbers) == 1 else "global ranks"
        text = f"{name} {' and '.join(run_words(numbers))} on {host}"
        hosts.append(f"{text} ({address})" if address else text)
    return few(hosts)


def _calls(found: Sequence[RankState]) -> str:
    """The collectives in which ranks are that run."""
    by_call: dict[str, list[int]] = {}
    for each in found:
        by_call.setdefault(each.text, []).append(each.place.global_rank)
    return few(
        f"global rank{'s' if len(ranks) > 1 else ''} {' and '.join(run_words(ranks))} "
        f"{'are' if len(ranks) > 1 else 'is'} in {call or 'no collective'}"
        for call, ranks in by_call.items()
    )


def ask(places: Sequence[Place], *, seconds: float = PATIENCE) -> list[RankState]:
    """Ask processes whether they run, all at once.

    Args:
        places: of their ranks.
        seconds: after which a process that has not answered is silent.

    Returns:
        What is known of each, in the order of `places`.
    """
    deadline = time.monotonic() + seconds
    questions = [_Question(place) for place in places]
    waiting = deque(questions)
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for question in questions:
            stack.callback(question.close)
        while waiting or selector.get_map():
            while waiting and len(selector.get_map()) < _AT_ONCE:
                waiting.popleft().begin(selector)
            left = deadline - time.monotonic()
            ready = selector.select(max(0.0, left))
            if left <= 0 and not ready:  # what came while this process was busy is read first
                break
            for key, _ in ready:
                key.data.proceed(selector)
    return [question.found for question in questions]


class _Question:
    """A question to one process, and what is known of it.

    Args:
        place: of its rank.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._connection: socket.socket | None = None
        self._is_asked = False
        self._answer = b""
        self.found = RankState(place, State.UNKNOWN, "too many others do not answer")

    def begin(self, selector: selectors.BaseSelector) -> None:
        """Begin to connect; `selector` then says when to proceed."""
        self.found = RankState(self._place, State.SILENT)
        if self._place.problem:
            self.found = RankState(self._place, State.UNKNOWN, self._place.problem)
            return
        try:
            connection = socket.socket(family_of(self._place.address), socket.SOCK_STREAM)
            self._connection = connection
            connection.setblocking(False)
            _check(connection.connect_ex((self._place.address, self._place.port)))
            selector.register(connection, selectors.EVENT_WRITE, self)
        except OSError as error:
            self.found = self._failed(error)

    def proceed(self, selector: selectors.BaseSelector) -> None:
        """Ask once there is a connection, and read the answer."""
        connection = self._connection
        if connection is None:
            return
        try:
            if not self._is_asked:
                _check(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
                connection.send(self._place.token)
                self._is_asked = True
                selector.modify(connection, selectors.EVENT_READ, self)
                return
            part = connection.recv(4096)
            self._answer += part
            if part and len(self._answer) <= _LONGEST:
                return
            self.found = self._answered()
        except BlockingIOError:
            return
        except OSError as error:
            self.found = self._failed(error)
        selector.unregister(connection)
        connection.close()

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def _answered(self) -> RankState:
        token, text = self._answer[:TOKEN], self._answer[TOKEN:]
        is_ours = hmac.compare_digest(token, self._place.token)
        if is_ours and len(self._answer) <= _LONGEST:
            return RankState(self._place, State.RUNS, short_text(text.decode(errors="replace")))
        # It ended while it was asked, or another process has its port now.
        return RankState(self._place, State.ENDED)

    def _failed(self, error: OSError) -> RankState:
        if error.errno in _REFUSED:
            return RankState(self._place, State.ENDED)
        if error.errno in _UNREACHED:
            return RankState(self._place, State.SILENT)
        return RankState(self._place, State.UNKNOWN, short_text(str(error)))


def _check(number: int) -> None:
    """Raise the error that a connection has."""
    if number not in _BEGUN:
        raise OSError(number, os.strerror(number))
