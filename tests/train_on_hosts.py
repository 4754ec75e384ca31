"""What a rank does in tests/test_hosts.py: steps of a small model, a checkpoint after each.

train_on_hosts.py FOLDER TIMEOUT STEPS DP TP
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

import shardproof as sp


def work(folder: Path, timeout: float, steps: int, dp: int, tp: int) -> None:
    axis = sp.Axis.from_env(timeout=timeout)
    axes = axis.split(dp=dp, tp=tp)
    names = {name: each.transport.name for name, each in axes.items()}
    (folder / f"rank{axis.rank}.json").write_text(json.dumps(names))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))
    plan = {"0": sp.ColumnParallel(), "2": sp.RowParallel()}
    model = sp.parallelize(plain, plan, axes["tp"], scheme=sp.Scheme(batch_leaves=8))
    parallel = sp.DataParallel(model, axes["dp"])
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(11, 6)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        parallel.backward(lambda at: (model(x[at]) - 1).square().sum(), len(x))
        optimizer.step()
        if axes["dp"].rank == 0:
            sp.save(folder / f"step-{step}", model, optimizer, step=step)
        if axis.rank == 0:
            print("step", step, flush=True)
        time.sleep(0.01)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:6]))
