"""Let other ranks ask whether this process still runs, where an axis spans several hosts.

If one host is lost, a collective of the backend fails on every rank, and the backend does not say
which rank is to blame. So each process of such an axis has one listening TCP socket, and a daemon
thread that answers on it with the collectives in which the process is. `asking.py` asks. Nothing is
opened where all ranks are on one host.

A process that was stopped accepts a connection, because its kernel does, and does not answer. The
thread reads one greeting, which only the ranks know. It never runs or unpickles what it receives.
"""

import atexit
import contextlib
import fcntl
import functools
import hmac
import ipaddress
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from shardproof.transport.base import living
from shardproof.wording import short_text

INTERFACE = "GLOO_SOCKET_IFNAME"
TOKEN = 16  # bytes that begin a question and its answer

_LONGEST = 400  # characters of an answer
_MOST_ASKERS = 256  # connections that have not asked yet; the oldest is closed
_PAUSE = 0.05  # seconds, if this process cannot accept a connection
_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


@dataclass(frozen=True)
class Place:
    """Where a rank is, as the ranks tell each other.

    Attributes:
        host: name of its host.
        global_rank: its rank among all processes.
        address, port: where its process answers.
        token: the bytes that begin a question to it, and its answer.
        problem: why it does not listen; "" if it does.
    """

    host: str
    global_rank: int
    address: str = ""
    port: int = 0
    token: bytes = b""
    problem: str = ""


def place_here(host: str) -> Place:
    """The place of this process, which listens from now on.

    Args:
        host: name of this host.
    """
    try:
        listener = _listener()
    except OSError as error:  # told to the others, so that all ranks go on alike
        return Place(host, dist.get_rank(), problem=short_text(str(error)))
    return Place(host, dist.get_rank(), listener.address, listener.port, listener.token)


# The places that the ranks of any axis have told each other, by the group of all processes.
_known: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, Place]]" = (
    weakref.WeakKeyDictionary()
)


def remember(places: Iterable[Place]) -> None:
    """Keep the places of ranks of this and other hosts, to ask them after a failure."""
    world = dist.group.WORLD
    if world is not None:
        _known.setdefault(world, {}).update((each.global_rank, each) for each in places)


def known_places() -> tuple[Place | None, list[Place]]:
    """The place of this process, and those of others by their global ranks, as far as known."""
    world = dist.group.WORLD
    places = {} if world is None else dict(sorted(_known.get(world, {}).items()))
    here = places.pop(dist.get_rank(), None) if places else None
    return here, list(places.values())


def family_of(address: str) -> socket.AddressFamily:
    """The family of an IP address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@functools.cache
def _listener() -> "_Listener":
    return _Listener(own_address(os.environ))


def _close() -> None:
    """Close the socket of this process, or in a fork the one that it inherited."""
    if _listener.cache_info().currsize:
        _listener().close()
        _listener.cache_clear()


# Otherwise a fork that outlives its rank would accept connections for it, and never answer.
os.register_at_fork(after_in_child=_close)
# A process may take long to end, and answers no more: it is then reported as ended.
atexit.register(_close)


class _Listener:
    """The socket of this process, and the thread that answers on it.

    Args:
        address: to listen on.
    """

    def __init__(self, address: str) -> None:
        self.token = secrets.token_bytes(TOKEN)
        self._socket = socket.socket(family_of(address), socket.SOCK_STREAM)
        try:
            self._socket.bind((address, 0))
            self._socket.listen(1024)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self.address, self.port = self._socket.getsockname()[:2]
        threading.Thread(target=self._serve, name="shardproof presence", daemon=True).start()

    def close(self) -> None:
        """Close the socket; the thread ends when it wakes."""
        self._socket.close()

    def _serve(self) -> None:
        askers: dict[socket.socket, None] = {}  # connections that have not asked yet, oldest first
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while self._socket.fileno() >= 0:
                for key, _ in selector.select():
                    asker = key.fileobj
                    if asker is self._socket:
                        new = self._accept()
                        if new is not None:
                            selector.register(new, selectors.EVENT_READ)
                            askers[new] = None
                    elif isinstance(asker, socket.socket) and asker in askers:
                        self._answer(asker)
                        _forget(asker, askers, selector)
                while len(askers) > _MOST_ASKERS:
                    _forget(next(iter(askers)), askers, selector)
            for asker in list(askers):
                _forget(asker, askers, selector)

    def _accept(self) -> socket.socket | None:
        try:
            asker, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):  # the asker has left
            return None
        except OSError:  # this process has no descriptor left, or is about to end
            time.sleep(_PAUSE)
            return None
        asker.setblocking(False)
        return asker

    def _answer(self, asker: socket.socket) -> None:
        """Answer a question that begins with the token; others get no answer."""
        with contextlib.suppress(OSError):  # the asker has left
            if hmac.compare_digest(asker.recv(TOKEN), self.token):
                asker.send(self.token + "; ".join(_calls()).encode()[:_LONGEST])


def _forget(
    asker: socket.socket, askers: dict[socket.socket, None], selector: selectors.BaseSelector
) -> None:
    selector.unregister(asker)
    del askers[asker]
    asker.close()


def _calls() -> list[str]:
    """The collectives in which the transports of this process are now."""
    while True:
        try:
            return [str(each.current_call) for each in list(living) if each.current_call]
        except RuntimeError:  # another thread has made a transport meanwhile
            continue


def own_address(environment: Mapping[str, str]) -> str:
    """The address by which other hosts reach this process.

    It is that of the interface that gloo was told to use. Without one it is the address from which
    this host reaches MASTER_ADDR, or else the address of the host's own name, as gloo takes it.

    Args:
        environment: variables of this process.

    Raises:
        OSError: there is none but those that only this host reaches.
    """
    for address in _addresses(environment):
        ip = ipaddress.ip_address(address)
        # A link-local IPv6 address is none without its interface, which each host names itself.
        if not (ip.is_loopback or ip.is_unspecified or (ip.version == 6 and ip.is_link_local)):
            return address
    raise OSError("this host has no address by which another host reaches it")


def _addresses(environment: Mapping[str, str]) -> Iterator[str]:
    interface = environment.get(INTERFACE, "").split(",")[0]
    if interface and sys.platform == "linux":
        yield from _of_interface(interface)
        return
    for name in (environment.get("MASTER_ADDR", ""), socket.gethostname()):
        if name:
            yield from _towards(name)


def _of_interface(interface: str) -> Iterator[str]:
    """The addresses of an interface of this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        request = struct.pack("256s", interface.encode()[:15])
        yield socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, name = line.split()
        if name == interface:
            yield str(ipaddress.IPv6Address(bytes.fromhex(digits)))


def _towards(name: str) -> Iterator[str]:
    """The addresses from which this host reaches a host; nothing is sent."""
    try:
        found = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
    except OSError:  # the name has no address
        return
    for family, kind, protocol, _, target in found:
        with (
            contextlib.suppress(OSError),  # no route
            socket.socket(family, kind, protocol) as probe,
        ):
            probe.connect(target)
            yield probe.getsockname()[0]
