"""How a sum is divided between hosts: what each host adds by itself, and what it sends to others.

All hosts have the same number of ranks, those of a host one after the other. The ranks of a host
add every subtree of the order whose parts they all have. Only these sums, the host's nodes, go to
other hosts. Each rank of a host does this for its share of the elements, together with the ranks at
the same place on the other hosts: its column. No tensors here, so that the bytes between hosts can
be predicted.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardproof.leaves import share
from shardproof.transport.base import Order, Window, rank_order


class HostNode(NamedTuple):
    """A sum that one host makes by itself.

    Attributes:
        parts: for each rank of the host, which of its parts are added.
        order: of the additions, over the ranks of the host.
    """

    parts: tuple[tuple[int, ...], ...]
    order: Order


class HostOrder(NamedTuple):
    """An order of additions, divided between hosts.

    Attributes:
        nodes: for each host, its nodes.
        between: the order in which the nodes are added, over the hosts.
    """

    nodes: tuple[tuple[HostNode, ...], ...]
    between: Order


@dataclass(frozen=True)
class HostRoute:
    """One sum on one rank.

    Attributes:
        host: of this rank.
        nodes: of this host.
        inside: one tuple for each step inside the host: what each of its ranks gets there.
        lengths: number of elements that this rank gets in each step.
        between: the order of the hosts' nodes.
        windows: what each host gets of this rank's column; None if all get all of it.
        gathered: elements of the sum that each rank of this host has at the end, which all of them
            gather; None if each rank keeps what it has.
    """

    host: int
    nodes: tuple[HostNode, ...]
    inside: tuple[tuple[Window, ...], ...]
    lengths: tuple[int, ...]
    between: Order
    windows: tuple[Window, ...] | None
    gathered: tuple[int, ...] | None

    def sent(self, node_bytes: int, result_bytes: int) -> dict[int, int]:
        """Bytes that this rank sends to each other host.

        Args:
            node_bytes: of one element of a node.
            result_bytes: of one element of the sum.
        """
        num_hosts = len(self.between.counts)
        if self.windows is not None:
            taken, kept = [each.numel for each in self.windows], 0
        else:
            taken = [len(each) for each in share(sum(self.lengths), num_hosts)]
            kept = taken[self.host]  # added here, and sent to all
        return {
            host: len(self.nodes) * taken[host] * node_bytes + kept * result_bytes
            for host in range(num_hosts)
            if host != self.host
        }


def host_route(
    order: Order, numel: int, windows: Sequence[Window] | None, *, rank: int, per_host: int
) -> HostRoute:
    """Divide a sum between hosts, as `rank` sees it.

    Args:
        order: of the additions, over all ranks.
        numel: number of elements of a part.
        windows: for each rank, what it gets of the sum; None if all get all of it.
        rank: of all ranks.
        per_host: number of ranks of each host.
    """
    inside: tuple[tuple[Window, ...], ...]
    divided = host_order(order, per_host)
    host, place = divmod(rank, per_host)
    nodes, between = divided.nodes[host], divided.between
    if windows is None:
        bounds = share(numel, per_host)
        inside = (tuple(Window(1, numel, 1, each.start, each.stop) for each in bounds),)
        gathered = tuple(map(len, bounds))
        return HostRoute(host, nodes, inside, gathered[place : place + 1], between, None, gathered)
    starts = range(0, len(windows), per_host)
    inside = tuple(tuple(windows[start : start + per_host]) for start in starts)
    lengths = tuple(each[place].numel for each in inside)
    ends = tuple(itertools.accumulate(lengths, initial=0))
    columns = tuple(Window(1, ends[-1], 1, *bound) for bound in itertools.pairwise(ends))
    return HostRoute(host, nodes, inside, lengths, between, columns, None)


def host_gather(lengths: Sequence[int], *, per_host: int) -> list[tuple[int, ...]]:
    """How the ranks of a host share out what it gathers, which each sends to every other host.

    Args:
        lengths: of what each rank has.
        per_host: number of ranks of each host.

    Returns:
        For each host, the lengths that its ranks send.

    >>> host_gather([3, 2, 4, 4], per_host=2)
    [(3, 2), (4, 4)]
    """
    starts = range(0, len(lengths), per_host)
    totals = [sum(lengths[start : start + per_host]) for start in starts]
    return [tuple(map(len, share(total, per_host))) for total in totals]


def host_order(order: Order, per_host: int) -> HostOrder:
    """Divide an order of additions between hosts.

    >>> divided = host_order(Order((1, 1, 1, 1), (0, 1, -1, 2, 3, -1, -1)), 2)
    >>> [len(nodes) for nodes in divided.nodes], divided.between.program
    ([1, 1], (0, 1, -1))
    """
    num_hosts = len(order.counts) // per_host
    if order.is_free:
        # Any order will do: the ranks of a host first. Between hosts it is a fixed one, so that
        # the bytes of each link are known.
        node = HostNode(((0,),) * per_host, rank_order(per_host))
        return HostOrder(
            ((node,),) * num_hosts, Order((1,) * num_hosts, rank_order(num_hosts).program)
        )
    owners = [rank for rank, count in enumerate(order.counts) for _ in range(count)]
    maximal, program = _maximal([owner // per_host for owner in owners], order.program)
    numbers = {first: number for number, first in enumerate(sorted(maximal))}
    nodes: list[list[HostNode]] = [[] for _ in range(num_hosts)]
    starts = [0, *itertools.accumulate(order.counts)]
    for first in sorted(maximal):
        host = owners[first] // per_host
        nodes[host].append(
            _node(maximal[first], starts, range(host * per_host, (host + 1) * per_host))
        )
    between = tuple(-1 if step < 0 else numbers[step] for step in program)
    return HostOrder(tuple(map(tuple, nodes)), Order(tuple(map(len, nodes)), between))


class _Sum(NamedTuple):
    """A sum on the stack: the host that has all of it, or None, and its postfix program."""

    host: int | None
    program: tuple[int, ...]


def _maximal(
    hosts: Sequence[int], program: Sequence[int]
) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...]]:
    """The largest sums that one host can make, and the order in which they are added.

    Args:
        hosts: the host of each part.
        program: of all parts.
    Returns:
        Smallest part of a sum -> its program; and the program that adds them, by these parts.
    """
    maximal: dict[int, tuple[int, ...]] = {}

    def named(each: _Sum) -> tuple[int, ...]:
        if each.host is None:
            return each.program
        first = min(step for step in each.program if step >= 0)
        maximal[first] = each.program
        return (first,)

    stack: list[_Sum] = []
    for step in program:
        if step >= 0:
            stack.append(_Sum(hosts[step], (step,)))
            continue
        right, left = stack.pop(), stack.pop()
        if left.host is not None and left.host == right.host:
            stack.append(_Sum(left.host, (*left.program, *right.program, -1)))
        else:
            stack.append(_Sum(None, (*named(left), *named(right), -1)))
    return maximal, named(stack.pop())


def _node(program: Sequence[int], starts: Sequence[int], ranks: range) -> HostNode:
    """A sum of one host, with parts numbered as the ranks of the host have them."""
    added = sorted(step for step in program if step >= 0)
    numbers = {part: number for number, part in enumerate(added)}
    parts = tuple(
        tuple(part - starts[rank] for part in added if starts[rank] <= part < starts[rank + 1])
        for rank in ranks
    )
    renamed = tuple(-1 if step < 0 else numbers[step] for step in program)
    return HostNode(parts, Order(tuple(map(len, parts)), renamed))
