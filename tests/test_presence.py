"""Which ranks of other hosts still answer: what is asked, what is told, and what stays shut."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.ranks import launch
from shardproof.transport import asking, presence
from shardproof.transport.asking import RankState, State, ask, told
from shardproof.transport.base import Call, PeerError
from shardproof.transport.presence import TOKEN, Place, own_address
from shardproof.transport.solo import SoloTransport

HOME = "127.0.0.1"
THREAD = "shardproof presence"
SHORT = 0.5  # seconds for which a process is asked that does not answer
SOURCES = str(Path(__file__).parents[1] / "src")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def listening(stack: ExitStack, *, backlog: int = 8) -> socket.socket:
    return stack.enter_context(socket.create_server((HOME, 0), backlog=backlog))


def place_of(listener: Any, *, rank: int = 1, token: bytes = bytes(TOKEN)) -> Place:
    return Place("elsewhere", rank, *listener.getsockname()[:2], token)


def running(stack: ExitStack, *, rank: int = 1) -> Place:
    """A place at which the thread of this process answers."""
    listener = presence._Listener(HOME)
    stack.callback(listener.close)
    return Place("elsewhere", rank, listener.address, listener.port, listener.token)


def states(places: list[Place]) -> list[State]:
    return [each.state for each in ask(places, seconds=SHORT)]


def full(stack: ExitStack) -> socket.socket:
    """A listening socket with no place left for a connection, as a host that drops all packets."""
    listener = listening(stack, backlog=0)
    for _ in range(4):
        filler = stack.enter_context(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
    return listener


def test_a_process_that_runs_answers_with_the_call_in_which_it_is(stack: ExitStack) -> None:
    """The call may be of any transport of the process."""

    class Busy(SoloTransport):
        current_call = Call("all_reduce", "forward", "the last layer", (3,), torch.float32)

    place = running(stack)
    assert ask([place]) == [RankState(place, State.RUNS)]
    busy = Busy()
    (found,) = ask([place])
    assert (found.state, found.text) == (State.RUNS, str(busy.current_call))


def test_a_process_that_does_not_answer_is_told_from_one_that_has_ended(stack: ExitStack) -> None:
    frozen = place_of(listening(stack), rank=1)
    ended = socket.create_server((HOME, 0))
    gone = place_of(ended, rank=2)
    ended.close()
    unreached = place_of(full(stack), rank=3)
    runs = running(stack, rank=4)
    shut = Place("elsewhere", 5, problem="no address")
    began = time.monotonic()
    found = ask([frozen, gone, unreached, runs, shut], seconds=SHORT)
    waited = time.monotonic() - began
    assert [each.state for each in found] == [
        State.SILENT, State.ENDED, State.SILENT, State.RUNS, State.UNKNOWN,
    ]  # fmt: skip
    assert found[4].text == "no address"
    assert SHORT <= waited < 3 * SHORT


def test_many_that_do_not_answer_take_one_wait(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_AT_ONCE", 5)
    frozen = place_of(listening(stack, backlog=64))
    runs = [running(stack) for _ in range(3)] * 6
    began = time.monotonic()
    found = states([*runs, *[frozen] * 7, *runs])
    assert time.monotonic() - began < 3 * SHORT
    assert found[:18] == [State.RUNS] * 18
    assert found[18:23] == [State.SILENT] * 5
    assert found[23:] == [State.UNKNOWN] * 20  # nobody waits longer for them


def test_another_process_at_the_port_of_one_that_has_ended(stack: ExitStack) -> None:
    other = running(stack)
    assert states([Place("elsewhere", 1, other.address, other.port, bytes(TOKEN))]) == [State.ENDED]


def test_a_port_where_something_else_talks(stack: ExitStack) -> None:
    """Neither a wrong answer nor a long one is believed."""
    listener = listening(stack)

    def talk() -> None:
        for answer in (b"HTTP/1.1 400 Bad Request", bytes(100_000)):
            with listener.accept()[0] as asker:
                asker.recv(TOKEN)
                with suppress(ConnectionError):  # nobody reads the end of a long one
                    asker.sendall(answer)

    thread = threading.Thread(target=talk)
    thread.start()
    assert states([place_of(listener)] * 2) == [State.ENDED] * 2
    thread.join()


def test_askers_that_ask_nothing_or_something_else_keep_nobody_waiting(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "_MOST_ASKERS", 9)
    place = running(stack)
    first = stack.enter_context(socket.create_connection((place.address, place.port)))
    for number in range(60):
        asker = stack.enter_context(socket.create_connection((place.address, place.port)))
        if number % 3 == 0:
            asker.send(b"GET / HTTP/1.1\r\n\r\n")
        if number % 3 == 1:
            asker.send(place.token[:3])
            asker.close()
    assert states([place] * 3) == [State.RUNS] * 3
    first.settimeout(5)
    assert first.recv(1) == b""  # the oldest, which is closed


def test_a_stranger_learns_nothing(stack: ExitStack) -> None:
    place = running(stack)
    with socket.create_connection((place.address, place.port)) as asker:
        asker.send(bytes(TOKEN))
        assert asker.recv(100) == b""


def test_a_process_with_busy_threads_answers(stack: ExitStack) -> None:
    place, is_over = running(stack), threading.Event()

    def spin() -> None:
        while not is_over.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=spin) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        assert [each.state for each in ask([place] * 3)] == [State.RUNS] * 3
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


FORKS = """
import os, sys, time
from shardproof.transport import presence
presence.own_address = lambda environment: "127.0.0.1"
listener = presence._listener()
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
print(listener.port, listener.token.hex(), child, flush=True)
sys.stdin.readline()
"""


def test_a_process_ends_with_its_thread_and_its_forks_do_not_answer_for_it() -> None:
    command = [sys.executable, "-c", FORKS]
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    port, token, child = process.stdout.readline().split()
    place = Place("elsewhere", 1, HOME, int(port), bytes.fromhex(token))
    try:
        assert states([place]) == [State.RUNS]
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(20) == 0
        assert states([place]) == [State.ENDED]
    finally:
        os.kill(int(child), 9)
        process.kill()
        process.stdout.close()


def found_of(*each: tuple[State, str, int, str]) -> list[RankState]:
    return [
        RankState(Place(host, rank, address="10.0.0.1", port=1), state, text)
        for state, host, rank, text in each
    ]


TOLD = [
    pytest.param(
        found_of((State.RUNS, "b", 2, "x"), (State.SILENT, "c", 4, ""), (State.SILENT, "c", 5, "")),
        "Global ranks 4 and 5 on c (10.0.0.1) do not answer within 2 s; global rank 2 on b "
        "(10.0.0.1) answers.",
        id="a lost host",
    ),
    pytest.param(
        found_of((State.RUNS, "a", 1, ""), (State.SILENT, "b", 2, ""), (State.SILENT, "c", 3, "")),
        "Global rank 2 on b (10.0.0.1), global rank 3 on c (10.0.0.1) do not answer within 2 s; "
        "global rank 1 on a (10.0.0.1) answers. No other host answers: the link of this host, a, "
        "may be down.",
        id="this host is cut off",
    ),
    pytest.param(
        found_of((State.ENDED, "b", 2, ""), (State.RUNS, "c", 3, "forward all_reduce")),
        "The process of global rank 2 on b (10.0.0.1) has ended; global rank 3 on c (10.0.0.1) "
        "answers. Global rank 3 is in forward all_reduce.",
        id="one has ended",
    ),
    pytest.param(
        found_of((State.RUNS, "b", 1, ""), (State.RUNS, "b", 2, "x"), (State.RUNS, "b", 3, "x")),
        "All other processes answer, so a rank is late or stuck. Global ranks 1-3 on b "
        "(10.0.0.1) answer. Global rank 1 is in no collective, global ranks 2 and 3 are in x.",
        id="one is late",
    ),
    pytest.param(
        found_of((State.UNKNOWN, "b", 1, "no address"), (State.ENDED, "c", 2, "")),
        "The process of global rank 2 on c (10.0.0.1) has ended; global rank 1 on b (10.0.0.1) "
        "could not be asked (no address).",
        id="one could not be asked",
    ),
]


@pytest.mark.parametrize(("found", "text"), TOLD)
def test_what_is_told(found: list[RankState], text: str) -> None:
    assert told(found, "a", seconds=2) == text


def test_a_rank_is_blamed_if_it_alone_can_be() -> None:
    def blamed(*each: tuple[State, str, int, str]) -> int | None:
        place = asking._blamed(found_of(*each), "a")
        return None if place is None else place.global_rank

    runs, ended = (State.RUNS, "b", 2, ""), (State.ENDED, "b", 2, "")
    silent = (State.SILENT, "c", 3, "")
    assert blamed(runs, silent) == 3
    assert blamed(ended, silent) == 3
    assert blamed(runs, ended) == 2
    assert blamed(silent) is None  # or the link of this host is down
    assert blamed(ended, (State.ENDED, "b", 3, "")) is None
    assert blamed(runs) is None


ADDRESSES = [
    ({"MASTER_ADDR": "127.0.0.1"}, OSError),
    ({"GLOO_SOCKET_IFNAME": "lo"}, OSError),
    ({"GLOO_SOCKET_IFNAME": "no such one"}, OSError),
]


@pytest.mark.parametrize(("environment", "error"), ADDRESSES)
def test_an_address_that_only_this_host_reaches_is_none(
    environment: dict[str, str], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(error, match="no address by which another host reaches it"):
        own_address(environment)


def on_hosts(work: Callable[[Axis], Any]) -> Callable[[Axis], Any]:
    """A function that each rank runs as if it was alone on its host."""

    def run(axis: Axis) -> Any:
        socket.gethostname, before = (lambda: f"host{axis.rank}"), socket.gethostname
        presence.own_address, chosen = (lambda _: HOME), presence.own_address
        try:
            return work(axis)
        finally:
            socket.gethostname, presence.own_address = before, chosen

    return run


def threads_named() -> int:
    return sum(thread.name == THREAD for thread in threading.enumerate())


def test_nothing_is_opened_for_ranks_of_one_host(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[Any, ...]:
        transport: Any = Axis.from_group(dist.group.WORLD, transport="gloo").transport
        return transport.places, presence.known_places(), threads_named()

    assert pool(2, "processes").run(work) == [((), (None, []), 0)] * 2


def test_a_late_rank_of_another_host_is_told_from_a_lost_one() -> None:
    @on_hosts
    def work(axis: Axis) -> tuple[Any, ...]:
        world = dist.group.WORLD
        spans = [Axis.from_group(world, transport="gloo", timeout=1.0) for _ in range(2)]
        assert threads_named() == 1  # for both axes
        x = torch.ones(3)
        comm.all_reduce(x, spans[0], direction="forward")
        if axis.rank == 1:
            time.sleep(4)
            return ()
        with pytest.raises(PeerError) as caught:
            comm.all_reduce(x, spans[0], direction="forward")
        return str(caught.value), caught.value.rank

    (text, rank), _ = launch(work, degree=2, engine="processes")
    assert "(global rank 0 on host0, with global rank 1 on host1) in forward all_reduce" in text
    assert text.endswith(
        "All other processes answer, so a rank is late or stuck. Global rank 1 on host1 "
        "(127.0.0.1) answers. Global rank 1 is in no collective."
    )
    assert rank is None


def test_what_fails_while_it_asks_does_not_hide_the_failure() -> None:
    @on_hosts
    def work(axis: Axis) -> str:
        spanning = Axis.from_group(dist.group.WORLD, transport="gloo", timeout=1.0)
        if axis.rank == 1:
            time.sleep(2)
            return ""

        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("bad luck")

        asking.ask = fail  # type: ignore[assignment]
        with pytest.raises(PeerError) as caught:
            comm.all_reduce(torch.ones(3), spanning, direction="forward")
        return str(caught.value)

    text, _ = launch(work, degree=2, engine="processes")
    assert "gloo failed on rank 0 of 2" in text
    assert text.endswith("could not be asked whether they run (ValueError: bad luck).")
