"""What a rank of tests/test_hosts.py does.

train_on_hosts.py steps FOLDER TIMEOUT DP TP    steps of a small model, until it is ended
train_on_hosts.py links FOLDER TIMEOUT DP TP    sums and gathers; what crosses each link
train_on_hosts.py commands FOLDER TIMEOUT DP TP COMMANDS    commands of shardproof, as JSON
"""

import json
import math
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import shardproof as sp
from shardproof import comm
from shardproof.cli.main import main
from shardproof.comm.plans import ShardOf, scatter_plan, tree_plan
from shardproof.leaves import Cut
from shardproof.transport.host_sums import host_gather, host_route
from shardproof.tree import nodes_of_run

ROUNDS = 10
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")  # of this host


def steps(folder: Path, axes: dict[str, sp.Axis]) -> None:
    """Train, and save a checkpoint after each step."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))
    plan = {"0": sp.ColumnParallel(), "2": sp.RowParallel()}
    model = sp.parallelize(plain, plan, axes["tp"], scheme=sp.Scheme(batch_leaves=8))
    parallel = sp.DataParallel(model, axes["dp"])
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(11, 6)
    for step in range(1, 100_000):
        optimizer.zero_grad()
        parallel.backward(lambda at: (model(x[at]) - 1).square().sum(), len(x))
        optimizer.step()
        if axes["dp"].rank == 0 and step % 5 == 0:
            sp.save(folder / f"step-{step:08}", model, optimizer, step=step)
        time.sleep(0.01)


def commands(lines: list[list[str]]) -> None:
    """Run commands of shardproof, one after the other, on the ranks that have met already."""
    for line in lines:
        try:
            with mock.patch("torch.distributed.destroy_process_group"):
                main(line, standalone_mode=False)
        except SystemExit as ended:
            if ended.code:
                raise


def links(folder: Path, axis: sp.Axis, per_host: int) -> None:
    """Count, predict and measure what this host sends in some collectives."""
    cut, rows, width = Cut(13, 13, axis.size), Cut(500, 500, axis.size), 201
    shape, into = (500, width), ShardOf((500, width), 0, rows)
    parts = {node: torch.ones(shape) for node in nodes_of_run(13, cut.run(axis.rank))}
    like = torch.empty(0)

    def sent_over(axis: sp.Axis) -> int:
        axis.gather_small(None, what="begin")
        before = int(SENT.read_text())
        for _ in range(ROUNDS):
            mine = {node: part.clone() for node, part in parts.items()}
            comm.all_reduce_nodes(mine, axis, cut=cut, shape=shape, like=like, direction="forward")
            part = comm.reduce_scatter_nodes(
                parts, axis, cut=cut, into=into, like=like, direction="forward"
            )
            comm.all_gather(part, axis, dim=0, cut=rows, direction="forward")
        axis.gather_small(None, what="end")
        return int(SENT.read_text()) - before

    group = axis.group() if axis.group is not None else None
    assert group is not None
    by_ranks = sent_over(sp.Axis.from_group(group, transport="gloo"))
    by_hosts = sent_over(axis)
    host, place = divmod(axis.rank, per_host)
    gathered = (
        4 * host_gather([width * each for each in rows.sizes()], per_host=per_host)[host][place]
    )
    routes = [
        host_route(plan.order, math.prod(shape), plan.windows, rank=axis.rank, per_host=per_host)
        for plan in (
            tree_plan("forward", "", shape, torch.float32, cut, axis.rank),
            scatter_plan("forward", "", into, torch.float32, cut, axis.rank),
        )
    ]
    predicted = {
        other: ROUNDS * (gathered + sum(route.sent(4, 4)[other] for route in routes))
        for other in range(axis.size // per_host)
        if other != host
    }
    result = {
        "counted": axis.transport.ledger.links,
        "predicted": predicted,
        "by hosts": by_hosts,
        "by ranks": by_ranks,
    }
    Path(folder, f"links{axis.rank}.json").write_text(json.dumps(result, sort_keys=True))


def run(what: str, folder: str, timeout: str, dp: str, tp: str, *more: str) -> None:
    axis = sp.Axis.from_env(timeout=float(timeout))
    axes = axis.split(dp=int(dp), tp=int(tp))
    names = {"all": axis.transport.name} | {
        name: each.transport.name for name, each in axes.items()
    }
    Path(folder, f"rank{axis.rank}.json").write_text(json.dumps(names))
    if what == "links":
        links(Path(folder), axis, int(tp))
    elif what == "steps":
        steps(Path(folder), axes)
    else:
        commands(json.loads(more[0]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(*sys.argv[1:])
