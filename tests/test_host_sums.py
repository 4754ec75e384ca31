"""Axes over several hosts: each adds what it has first, and the bits are those of one host."""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agreeing import MODEL, check_all_said, mlp, said
from places import Pool
from played_hosts import over_hosts
from shardproof import c_modules, comm
from shardproof.axis import Axis
from shardproof.comm.plans import ShardOf, scatter_plan, tree_order, tree_plan
from shardproof.comm.started import start_planned
from shardproof.data_parallel import DataParallel
from shardproof.errors import MismatchError, RankError, ShapeError
from shardproof.gradient_buckets import Bucket
from shardproof.leaves import Cut, share
from shardproof.numerics.precision import node_dtype
from shardproof.plans.apply import parallelize
from shardproof.plans.host_cost import sent_by_hosts
from shardproof.plans.layout_cost import BatchLayout, layout_cost
from shardproof.plans.planning import plan
from shardproof.recut import to_columns
from shardproof.scheme import Scheme
from shardproof.transport.base import Call, Order, PeerError, rank_order
from shardproof.transport.host_sums import host_order, host_route
from shardproof.transport.hosts import HostsTransport
from shardproof.tree import add_tensors, combine, nodes_of_run

pytestmark = pytest.mark.skipif(
    c_modules.shm() is None, reason="ranks of a host share memory by the C module"
)
Work = Callable[[Axis], Any]
HOSTS = pytest.mark.parametrize(("degree", "hosts"), [(4, 2), (6, 3), (6, 2)])
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def run(pool: Pool, degree: int, hosts: int, work: Work) -> list[Any]:
    """Every rank's result, on an axis over some hosts."""
    return pool(degree, "processes").run(lambda axis: work(over_hosts(axis, hosts)))


def formula(order: Order, names: list[str]) -> str:
    """The additions of an order, as brackets."""
    stack: list[str] = []
    for step in order.program:
        if step >= 0:
            stack.append(names[step])
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(f"({left}+{right})")
    (written,) = stack
    return written


@pytest.mark.parametrize(("degree", "per_host"), [(4, 2), (6, 2), (6, 3), (8, 4), (9, 3)])
@pytest.mark.parametrize("leaves", [9, 13, 16, 23])
def test_hosts_make_the_same_additions(degree: int, per_host: int, leaves: int) -> None:
    """The brackets of all steps, put together, are those of the order."""
    order = tree_order(Cut(3 * leaves, leaves, degree))
    owners = [rank for rank, count in enumerate(order.counts) for _ in range(count)]
    names = [f"{rank}.{owners[:at].count(rank)}" for at, rank in enumerate(owners)]
    divided = host_order(order, per_host)
    sums = []
    for host, nodes in enumerate(divided.nodes):
        for node in nodes:
            node.order.check(per_host)
            of_host = [
                f"{host * per_host + place}.{part}"
                for place, parts in enumerate(node.parts)
                for part in parts
            ]
            sums.append(formula(node.order, of_host))
    divided.between.check(degree // per_host)
    assert formula(divided.between, sums) == formula(order, names)
    # Each sum is as large as it can be: none of two that are added is of one host.
    program = divided.between.program
    hosts = [host for host, count in enumerate(divided.between.counts) for _ in range(count)]
    for one, other, step in zip(program, program[1:], program[2:], strict=False):
        assert step >= 0 or min(one, other) < 0 or hosts[one] != hosts[other]


def test_order_that_mixes_hosts_is_divided_too() -> None:
    order = Order((1, 1, 1, 1), (0, 2, -1, 1, 3, -1, -1))
    divided = host_order(order, 2)
    assert [len(nodes) for nodes in divided.nodes] == [2, 2]
    assert formula(divided.between, ["0", "1", "2", "3"]) == "((0+2)+(1+3))"


def parts_of(cut: Cut, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> dict[Any, Tensor]:
    """The nodes of a rank, other numbers for each."""
    generator = torch.Generator().manual_seed(rank)
    return {
        node: torch.randn(shape, generator=generator, dtype=node_dtype(dtype))
        for node in nodes_of_run(cut.num_leaves, cut.run(rank))
    }


def whole_sum(cut: Cut, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The sum of all nodes by the tree, on one rank."""
    nodes: dict[Any, Tensor] = {}
    for rank in range(cut.degree):
        nodes |= parts_of(cut, rank, shape, dtype)
    return combine((0, cut.num_leaves), nodes, add_tensors).to(dtype)


@HOSTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_have_the_bits_of_the_tree(
    degree: int, hosts: int, dtype: torch.dtype, pool: Pool
) -> None:
    """Ranks and hosts without a leaf, messages of no element, of one, and of fewer than ranks."""
    cuts = [
        Cut(size, leaves, degree) for size, leaves in ((50, 16), (50, 7), (6, 6), (2, 8), (1, 6))
    ]
    lengths = (0, 1, 5, 3001)

    def work(axis: Axis) -> list[Tensor]:
        assert isinstance(axis.transport, HostsTransport)
        like = torch.empty(0, dtype=dtype)
        found = []
        for cut, length in itertools.product(cuts, lengths):
            nodes = parts_of(cut, axis.rank, (length,), dtype)
            found.append(
                comm.all_reduce_nodes(
                    nodes, axis, cut=cut, shape=(length,), like=like, direction="forward"
                )
            )
        for cut, length in itertools.product(cuts, (2, 11)):
            shape, rows = (3, length, 2), Cut(length, 8, degree)
            nodes = parts_of(cut, axis.rank, shape, dtype)
            into = ShardOf(shape, 1, rows)
            part = comm.reduce_scatter_nodes(
                nodes, axis, cut=cut, into=into, like=like, direction="forward"
            )
            owned = rows.owned(axis.rank)
            assert torch.equal(part, whole_sum(cut, shape, dtype)[:, owned.start : owned.stop])
            found.append(comm.all_gather(part, axis, dim=1, cut=rows, direction="forward"))
        return found

    wanted = [whole_sum(cut, (length,), dtype) for cut, length in itertools.product(cuts, lengths)]
    wanted += [
        whole_sum(cut, (3, length, 2), dtype) for cut, length in itertools.product(cuts, (2, 11))
    ]
    for found in run(pool, degree, hosts, work):
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@HOSTS
def test_parts_of_16_bits_are_rounded_once(degree: int, hosts: int, pool: Pool) -> None:
    order = Order((1,) * degree, rank_order(degree).program)
    parts = [
        torch.randn(99, generator=torch.Generator().manual_seed(rank)).bfloat16()
        for rank in range(degree)
    ]
    call = Call("all_reduce", "forward", "layer", (99,), torch.bfloat16)

    def work(axis: Axis) -> Tensor:
        out = torch.empty(99, dtype=torch.bfloat16)
        axis.transport.sum([parts[axis.rank]], order, out, call=call)
        return out

    wanted = functools.reduce(torch.add, [part.float() for part in parts]).bfloat16()
    assert all(torch.equal(out, wanted) for out in run(pool, degree, hosts, work))


def test_two_sums_are_open_at_a_time(pool: Pool) -> None:
    cut = Cut(40, 16, 4)

    def work(axis: Axis) -> list[Tensor]:
        started = []
        sums = []
        for number in range(5):
            shape = (100 + number,)
            plan = tree_plan("forward", f"{number}", shape, torch.float32, cut, axis.rank)
            nodes = list(parts_of(cut, axis.rank, shape, torch.float32).values())
            started.append(start_planned(nodes, axis, plan, torch.empty(0)))
            if len(started) == 2:
                sums.append(started.pop(0).wait())
        return [*sums, started.pop().wait()]

    for sums in run(pool, 4, 2, work):
        for number, each in enumerate(sums):
            assert torch.equal(each, whole_sum(cut, (100 + number,), torch.float32))


def loss_and_gradients(axis: Axis) -> list[Tensor]:
    """Of a column and a row layer, this rank's parts."""
    model = mlp(axis)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    loss = model(x).square().sum()
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


@HOSTS
def test_links_count_what_the_plan_says(degree: int, hosts: int, pool: Pool) -> None:
    cut, rows, shape = Cut(50, 16, degree), Cut(31, 8, degree), (31, 7)
    into = ShardOf(shape, 0, rows)
    per_host = degree // hosts

    def work(axis: Axis) -> dict[int, int]:
        like = torch.empty(0)
        nodes = parts_of(cut, axis.rank, shape, torch.float32)
        comm.reduce_scatter_nodes(nodes, axis, cut=cut, into=into, like=like, direction="forward")
        comm.all_reduce_nodes(nodes, axis, cut=cut, shape=shape, like=like, direction="forward")
        return axis.transport.ledger.links

    numel = 31 * 7
    for rank, counted in enumerate(run(pool, degree, hosts, work)):
        plans = (
            scatter_plan("forward", "", into, torch.float32, cut, rank),
            tree_plan("forward", "", shape, torch.float32, cut, rank),
        )
        routes = [
            host_route(each.order, numel, each.windows, rank=rank, per_host=per_host)
            for each in plans
        ]
        host = rank // per_host
        others = set(range(hosts)) - {host}
        assert counted == {each: sum(r.sent(4, 4)[each] for r in routes) for each in others}


def test_free_sum_sends_one_part_of_each_host() -> None:
    route = host_route(rank_order(6), 100, None, rank=4, per_host=2)
    assert [len(share(100, 2)[0])] == list(route.lengths)
    lengths = [len(each) for each in share(50, 3)]
    assert route.sent(4, 4) == {0: 4 * (lengths[0] + lengths[2]), 1: 4 * (lengths[1] + lengths[2])}


@HOSTS
def test_step_sends_what_the_layout_predicts(degree: int, hosts: int, pool: Pool) -> None:
    """Gradients of one step, in several buckets, with 8 leaves that no rank shares evenly."""
    scheme, x = Scheme(batch_leaves=8), torch.ones(8, 12)

    def work(axis: Axis) -> int:
        model = parallelize(copy.deepcopy(MODEL), None, Axis.solo(), inputs=x[:1], scheme=scheme)
        parallel = DataParallel(model, axis, bucket_bytes=1000)
        parallel.backward(lambda samples: model(x[samples]).square().sum(), len(x))
        return sum(axis.transport.ledger.links.values())

    counted = run(pool, degree, hosts, work)
    made = plan(copy.deepcopy(MODEL), degree=1, inputs=x[:1], scheme=scheme)
    per_host = degree // hosts
    layout = BatchLayout(degree, bucket_bytes=1000, ranks_per_host=per_host)
    of_hosts = [sum(counted[start : start + per_host]) for start in range(0, degree, per_host)]
    assert list(layout_cost(made, layout).host_bytes or ()) == of_hosts


@pytest.mark.parametrize(("dp", "per_host"), [(6, 2), (9, 3), (24, 8), (8, 1), (4, 4)])
def test_hosts_send_what_their_ranks_send(dp: int, per_host: int) -> None:
    """The arithmetic of a host beside the routes of all its ranks."""
    sizes, leaves = (1, 5, 1003), 29
    buckets = [Bucket("", (0,), (size,), torch.float32, torch.device("cpu")) for size in sizes]
    order = tree_order(Cut(leaves, leaves, dp))
    ranks = [
        sum(
            sum(host_route(order, size, None, rank=rank, per_host=per_host).sent(4, 4).values())
            for size in sizes
        )
        for rank in range(dp)
    ]
    wanted = [2 * sum(ranks[start : start + per_host]) for start in range(0, dp, per_host)]
    sent = sent_by_hosts([buckets] * 2, leaves=leaves, dp=dp, ranks_per_host=2 * per_host)
    assert list(sent) == wanted
    if per_host == 1:  # then each rank sends all of it to other hosts
        plans = [
            tree_plan("forward", "", (size,), torch.float32, Cut(leaves, leaves, dp), rank)
            for rank in range(dp)
            for size in sizes
        ]
        assert 2 * sum(each.sent_bytes for each in plans) == sum(sent)


# ---- ranks that disagree


def other_call(axis: Axis, odd: set[int]) -> None:
    who = "odd" if axis.rank in odd else "even"
    comm.all_reduce(torch.ones(3), axis, direction="forward", who=who)


def gather_against_sum(axis: Axis, odd: set[int]) -> None:
    if axis.rank in odd:
        axis.agree({"x": 1}, what="odd")
    else:
        comm.all_reduce(torch.ones(3), axis, direction="forward", who="even")


def exchange_against_sum(axis: Axis, odd: set[int]) -> None:
    if axis.rank in odd:
        rows, columns = Cut(9, 8, axis.size), Cut(5, 5, axis.size)
        x = torch.ones(len(rows.owned(axis.rank)), 5)
        to_columns(x, axis, rows=rows, columns=columns, direction="forward", who="odd")
    else:
        comm.all_reduce(torch.ones(3), axis, direction="forward", who="even")


def is_well(axis: Axis) -> bool:
    """After an error, the next collectives are as good as any."""
    every = (comm.all_reduce(torch.ones(3), axis, direction="forward") for _ in range(4))
    return all(each.tolist() == [axis.size] * 3 for each in every)


@pytest.mark.parametrize("odd", [{1}, {3}, {0, 1}, {2, 3}, {1, 2}], ids=str)
@pytest.mark.parametrize("what", [other_call, gather_against_sum, exchange_against_sum])
def test_ranks_that_disagree_all_raise(what: Any, odd: set[int], pool: Pool) -> None:
    """A rank of a host, all ranks of a host, and ranks of both."""

    def work(axis: Axis) -> tuple[str, bool]:
        return said(functools.partial(what, axis, odd)), is_well(axis)

    results = run(pool, 4, 2, work)
    check_all_said([message for message, _ in results], "odd", "even")
    assert all(well for _, well in results)


@pytest.mark.parametrize("odd", [{1}, {2, 3}], ids=str)
def test_other_inputs_are_named(odd: set[int], pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, bool]:
        model = mlp(axis)
        x = torch.ones(3, 12) + (axis.rank in odd)
        return said(lambda: model(x)), is_well(axis)

    results = run(pool, 4, 2, work)
    check_all_said([m for m, _ in results], "input of '0'", f"rank {min(odd)}")
    assert all(well for _, well in results)


@pytest.mark.parametrize("odd", [{2}, {0, 1, 2, 3}], ids=str)
def test_refused_call_ends_all_ranks(odd: set[int], pool: Pool) -> None:
    """The rank whose tensor does not fit raises why, and the others learn it."""
    call = Call("all_gather", "forward", "layer", (8,), torch.float32)

    def work(axis: Axis) -> tuple[str, bool]:
        x = torch.ones(2 + (axis.rank in odd))
        try:
            axis.transport.all_gather(x, torch.empty(8), [2] * 4, call=call)
        except (ShapeError, MismatchError) as error:
            return str(error), is_well(axis)
        return "", False

    for message, well in run(pool, 4, 2, work):
        assert "has 3 elements and room for 8" in message
        assert well


def test_rank_that_raises_ends_all(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        comm.all_reduce(torch.ones(3), axis, direction="forward")
        if axis.rank == 2:
            raise ValueError("no more")
        comm.all_reduce(torch.ones(3), axis, direction="forward")

    with pytest.raises((RankError, PeerError), match=r"rank 2 .*no more"):
        run(pool, 4, 2, work)


# ---- models


@HOSTS
def test_model_has_the_bits_of_one_host(degree: int, hosts: int, pool: Pool) -> None:
    wanted = pool(degree, "threads").run(loss_and_gradients)
    for mine, found in zip(wanted, run(pool, degree, hosts, loss_and_gradients), strict=True):
        assert len(mine) == len(found) == 5
        assert all(map(torch.equal, found, mine))
