"""`HostsTransport`: shared memory inside each host, gloo between hosts.

A sum is made inside each host first, and only its nodes go to other hosts (`host_sums`). A gather
sends the data of a host once to each other host, and not once to each of its ranks. Every
collective begins inside the host and goes on between hosts, so that ranks whose calls differ meet:
inside the host, or at the same place on another one. They then gather their calls, and all raise.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from shardproof import c_modules
from shardproof.errors import AxisError, MismatchError, ShapeError, ShardproofError
from shardproof.transport import portable
from shardproof.transport.agreement import disagreement
from shardproof.transport.base import Call, Order, Pending, Transport, Window
from shardproof.transport.distributed import DistributedTransport
from shardproof.transport.host_sums import HostRoute, host_gather, host_route
from shardproof.transport.ledger import Ledger
from shardproof.transport.notes import NOTHING, CallNotes, Notes
from shardproof.transport.segment import Host
from shardproof.transport.shared_memory import SharedTransport
from shardproof.transport.subgroups import subgroup

_MOST_ROUTES = 4096  # are kept
_MARGIN = 10.0  # seconds that ranks of a host wait longer than those that wait for another host
_CONNECTED = Call("gather", "setup", "the memory of each host")
# The calls of ranks that cannot make the call of the others. They never equal a call of a layer.
_REFUSED = Call("refused", "setup", "a collective that this rank refuses")
_DIFFER = Call("gather", "setup", "the calls of ranks whose calls differ")


class _HandedOn(Notes):
    """The notes of a stage: those of the whole collective, once."""

    def __init__(self) -> None:
        super().__init__()
        self.next = NOTHING

    def take(self) -> CallNotes:
        """Return what was handed on, and clear it."""
        taken, self.next = self.next, NOTHING
        return taken


class _HostsSum(Pending):
    """A sum whose part between hosts was started."""

    def __init__(
        self,
        transport: "HostsTransport",
        pending: Pending,
        part: Tensor,
        out: Tensor,
        route: HostRoute,
        call: Call,
        call_notes: CallNotes,
    ) -> None:
        self._transport = transport
        self._pending = pending
        self._part = part
        self._out = out
        self._route = route
        self._call = call
        self._call_notes = call_notes

    def wait(self) -> None:
        """Finish the part of this rank, and gather the parts of the host."""
        self._transport.finish(
            self._pending, self._part, self._out, self._route, self._call, self._call_notes
        )


class HostsTransport(Transport):
    """One rank's end of the ranks of several hosts, with several ranks on each.

    Args:
        base: all ranks; those of a host one after the other.
        inside: the ranks of this host.
        between: the ranks at this rank's place on every host, which make a column.

    Attributes:
        ledger: its `links` are the bytes that this rank sent to each other host.
    """

    name = "hosts"
    is_asynchronous = True

    def __init__(
        self, base: DistributedTransport, inside: SharedTransport, between: DistributedTransport
    ) -> None:
        self.rank = base.rank
        self.size = base.size
        self.timeout = base.timeout
        self.ledger = Ledger()
        self.notes = Notes()
        self._base = base
        self._inside = inside
        self._between = between
        self._base.notes = None
        self._stages = _HandedOn(), _HandedOn()
        self._inside.notes, self._between.notes = self._stages
        self._routes: dict[tuple[Any, ...], tuple[HostRoute, tuple[Any, ...]]] = {}

    @classmethod
    def connect(cls, base: DistributedTransport, *, timeout: float) -> "HostsTransport":
        """Map memory inside each host, and open groups between hosts; all ranks call this.

        Args:
            base: the ranks.
            timeout: seconds that a rank waits for the others in one collective.

        Raises:
            AxisError: on all ranks, if each host does not have equally many ranks, several and one
                after the other, or if those of one host cannot share memory.
        """
        per_host = _ranks_per_host(base)
        host, place = divmod(base.rank, per_host)
        ours = range(host * per_host, (host + 1) * per_host)
        inside, problem = None, ""
        try:
            # A rank that waits for another host gives up first, and tells the others which one.
            inside = SharedTransport.connect(
                DistributedTransport(subgroup(base.group, ours, timeout=base.timeout)),
                timeout=timeout + _MARGIN,
            )
        except AxisError as error:
            problem = str(error)
        problems: list[str] = base.gather_objects(problem, call=_CONNECTED)
        if inside is None or any(problems):
            raise AxisError(next(filter(None, problems)))
        column = range(place, base.size, per_host)
        between = DistributedTransport(
            subgroup(base.group, column, timeout=base.timeout), timeout=base.timeout
        )
        between.hosts, between.places = base.hosts[place::per_host], base.places[place::per_host]
        return cls(base, inside, between)

    @torch.no_grad()
    def exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        *,
        rounds: int,
        like: Tensor,
        call: Call,
    ) -> list[list[Tensor]]:
        """Send each piece directly to its rank, by gloo."""
        mine = torch.zeros(1, dtype=torch.uint8, device="cpu")
        with self._comparing(call) as call_notes:
            self._meet_inside(mine, call)
        with self._comparing(call, call_notes, is_between=True):
            per_column = [1] * self._between.size
            self._between.all_gather(
                mine, mine.new_empty(self._between.size), per_column, call=call
            )
        for rank, pieces in enumerate(outgoing):
            self._count({self._host(rank): sum(each.nbytes for each in pieces)})
        return self._base.exchange(outgoing, incoming, rounds=rounds, like=like, call=call)

    @torch.no_grad()
    def all_gather(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call, outer: int = 1
    ) -> None:
        """Gather inside each host, then between hosts by columns, then the columns."""
        lengths = [outer * size for size in sizes]
        try:
            portable.check_gather(self, x, out, sizes, call, outer)
        except ShapeError as error:
            self._refuse(call, error)
        per_host, place, host = self._inside.size, self._inside.rank, self._host(self.rank)
        shares = host_gather(lengths, per_host=per_host)
        columns = [[each[other] for each in shares] for other in range(per_host)]
        with self._comparing(call) as call_notes:
            ours = x.new_empty(sum(shares[host]))
            mine = lengths[host * per_host : (host + 1) * per_host]
            self._inside.all_gather(x, ours, mine, call=call)
        with self._comparing(call, call_notes, is_between=True):
            piece = ours.split(shares[host])[place]
            column = x.new_empty(sum(columns[place]))
            self._between.all_gather(piece, column, columns[place], call=call)
            self._count(dict.fromkeys(range(self._between.size), piece.nbytes))
        widths = list(map(sum, columns))
        every = x.new_empty(sum(widths))
        with self._comparing(call, call_notes):
            self._inside.all_gather(column, every, widths, call=call)
        flat = out if outer == 1 else torch.empty_like(out)
        pieces = [  # of each column, by host
            list(each.split(column_lengths))
            for each, column_lengths in zip(every.split(widths), columns, strict=True)
        ]
        in_order = [column[each] for each in range(self._between.size) for column in pieces]
        torch.cat(in_order, out=flat)
        if outer > 1:
            parts = [part.view(outer, -1) for part in flat.split(lengths) if part.numel()]
            torch.cat(parts, 1, out=out.view(outer, -1))

    @torch.no_grad()
    def start_sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> Pending:
        """Sum inside the host, and start to send its nodes."""
        try:
            dtype = portable.check(self, parts, order, out, call, windows)
        except ShardproofError as error:
            self._refuse(call, error)
        route = self._route(order, _whole(out, windows), call, windows)
        if dtype in portable.NARROW and not order.is_free:  # rounded once, after the last addition
            dtype = torch.float32
            parts = [part.float() for part in parts]
        with self._comparing(call) as call_notes:
            nodes = self._nodes(parts, route, out.new_empty(0, dtype=dtype), call)
        part = out if route.gathered is None else out.new_empty(sum(route.lengths))
        with self._comparing(call, call_notes, is_between=True):
            pending = self._between.start_sum(
                nodes, route.between, part, call=call, windows=route.windows
            )
            self._count(route.sent(dtype.itemsize, out.element_size()))
        return _HostsSum(self, pending, part, out, route, call, call_notes)

    @torch.no_grad()
    def finish(
        self,
        pending: Pending,
        part: Tensor,
        out: Tensor,
        route: HostRoute,
        call: Call,
        call_notes: CallNotes,
    ) -> None:
        """Finish a sum that was started.

        Args:
            pending: its part between hosts.
            part: what that part fills.
            out: the sum.
            route: of the sum.
            call: of the sum.
            call_notes: that went with it.
        """
        with self._comparing(call, call_notes, is_between=True):
            pending.wait()
        if route.gathered is not None:
            with self._comparing(call, call_notes):
                self._inside.all_gather(part, out, route.gathered, call=call)

    @torch.no_grad()
    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Gather inside each host, then between hosts."""
        with self._comparing(call) as call_notes:
            ours = self._inside.gather_objects(value, call=call)
        with self._comparing(call, call_notes, is_between=True):
            by_host: list[list[Any]] = self._between.gather_objects(ours, call=call)
        return list(itertools.chain(*by_host))

    def _nodes(
        self, parts: Sequence[Tensor], route: HostRoute, like: Tensor, call: Call
    ) -> list[Tensor]:
        """This rank's column of the nodes of its host."""
        nodes = []
        for node in route.nodes:
            own = [parts[number] for number in node.parts[self._inside.rank]]
            column = like.new_empty(sum(route.lengths))
            for windows, piece in zip(route.inside, column.split(route.lengths), strict=True):
                self._inside.sum(own, node.order, piece, call=call, windows=windows)
            nodes.append(column)
        if not nodes:  # no rank of this host has a part, but their calls are compared
            self._meet_inside(torch.zeros(1, dtype=torch.uint8, device="cpu"), call)
        return nodes

    def _meet_inside(self, mine: Tensor, call: Call) -> None:
        """Compare the calls of the ranks of this host."""
        size = self._inside.size
        self._inside.all_gather(mine, mine.new_empty(size), [1] * size, call=call)

    def _route(
        self, order: Order, numel: int, call: Call, windows: Sequence[Window] | None
    ) -> HostRoute:
        """The route of a sum of so many elements, computed once for the same objects."""
        key = id(call), id(order), id(windows), numel
        known = self._routes.get(key)
        if known is not None:
            return known[0]
        route = host_route(order, numel, windows, rank=self.rank, per_host=self._inside.size)
        if windows is None or isinstance(windows, tuple):  # a list may be changed
            if len(self._routes) >= _MOST_ROUTES:
                self._routes.clear()
            self._routes[key] = route, (call, order, windows)
        return route

    def _host(self, rank: int) -> int:
        return rank // self._inside.size

    def _count(self, sent: dict[int, int]) -> None:
        """Count bytes that this rank sent to other hosts."""
        for host, num_bytes in sent.items():
            if host != self._host(self.rank):
                self.ledger.links[host] = self.ledger.links.get(host, 0) + num_bytes

    @contextmanager
    def _comparing(
        self, call: Call, call_notes: CallNotes | None = None, *, is_between: bool = False
    ) -> Iterator[CallNotes]:
        """Run one stage of a collective: all ranks raise if their calls differ.

        Args:
            call: the collective.
            call_notes: that go with it, after its first stage.
            is_between: whether the stage is between hosts, and not inside one.
        """
        if call_notes is None:
            call_notes = self.take_notes()
            for stage in self._stages:
                stage.next = call_notes
        try:
            yield call_notes
        except MismatchError:
            self._raise_mismatch(str(call), call_notes, is_told=is_between)
        except BaseException as error:
            if is_between:  # the other ranks of this host may wait for this one
                self._inside.fail(error)
            raise

    def _refuse(self, call: Call, error: ShardproofError) -> NoReturn:
        """Raise `error`, after all ranks have seen that this one cannot take part."""
        text, is_told = f"{call}\nwhich it refuses: {str(error).rstrip('.')}", False
        try:
            self._inside.gather_objects(None, call=_REFUSED)
            is_told = True
            self._between.gather_objects(None, call=_REFUSED)
        except MismatchError:
            self._raise_mismatch(text, NOTHING, is_told=is_told, cause=error)
        raise error

    def _raise_mismatch(
        self,
        text: str,
        call_notes: CallNotes,
        *,
        is_told: bool,
        cause: ShardproofError | None = None,
    ) -> NoReturn:
        """Gather the calls of all ranks, and raise the mismatch on all of them.

        Args:
            text: the call of this rank.
            call_notes: that went with it.
            is_told: whether the ranks of the other hosts know that calls differ.
            cause: why this rank refuses the call.
        """
        if not is_told:
            with contextlib.suppress(MismatchError):  # they wait between hosts, with a call
                self._between.gather_objects(None, call=_REFUSED)
        error = disagreement(
            text, call_notes, lambda mine: self._base.gather_objects(mine, call=_DIFFER)
        )
        self.forget_notes()
        raise error from cause


def _whole(out: Tensor, windows: Sequence[Window] | None) -> int:
    """Number of elements of a part."""
    if windows is None:
        return out.numel()
    return windows[0].outer * windows[0].size * windows[0].inner


def _ranks_per_host(base: DistributedTransport) -> int:
    """Number of ranks of each host.

    Raises:
        AxisError: on all ranks, if hosts have other numbers, or one each, or their ranks are mixed.
    """
    here = Host.here(0, c_modules.problem() if c_modules.shm() is None else None)
    hosts: list[Host] = base.gather_objects(here, call=_CONNECTED)
    problem = next((each.problem for each in hosts if each.problem is not None), None)
    if problem is not None:
        raise AxisError(f"a rank cannot share memory: {problem}.")
    runs = [
        (key, len(list(run)))
        for key, run in itertools.groupby((each.boot, each.namespace) for each in hosts)
    ]
    counts = [count for _, count in runs]
    if len(runs) == 1:
        raise AxisError("all ranks are on one host.")
    if len({key for key, _ in runs}) < len(runs):
        raise AxisError("the ranks of a host do not follow one another.")
    if set(counts) == {1}:
        raise AxisError("each host has one rank.")
    if len(set(counts)) > 1:
        raise AxisError(f"the hosts have {', '.join(map(str, counts))} ranks.")
    return counts[0]
