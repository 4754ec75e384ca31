"""What a rank of tests/test_hosts.py does.

train_on_hosts.py steps FOLDER TIMEOUT DP TP    steps of a small model, until it is ended
train_on_hosts.py commands FOLDER TIMEOUT DP TP COMMANDS    commands of shardproof, as JSON
"""

import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import shardproof as sp
from shardproof.cli.main import main


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


def run(what: str, folder: str, timeout: str, dp: str, tp: str, *more: str) -> None:
    axis = sp.Axis.from_env(timeout=float(timeout))
    axes = axis.split(dp=int(dp), tp=int(tp))
    names = {"all": axis.transport.name} | {
        name: each.transport.name for name, each in axes.items()
    }
    Path(folder, f"rank{axis.rank}.json").write_text(json.dumps(names))
    if what == "steps":
        steps(Path(folder), axes)
    else:
        commands(json.loads(more[0]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(*sys.argv[1:])
