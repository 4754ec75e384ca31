"""The same block on torchrun's ranks, on one machine or many, with a DeviceMesh if you have one.

torchrun --nproc-per-node 3 examples/under_torchrun.py
"""

import torch
import torch.distributed as dist

import shardproof as sp  # before the first matrix product: it sets the BLAS mode

axis = sp.Axis.from_env()  # or sp.Axis.from_mesh(mesh["tp"])
x = torch.linspace(-1, 1, 4 * 37).view(4, 37)

# No rank ever draws a full weight, and every degree draws the same numbers.
column = sp.ColumnParallelLinear(37, 250, axis=axis, name="up")
row = sp.RowParallelLinear(250, 9, axis=axis, name="down")
y = row(torch.relu(column(x)))

alone = sp.Axis.solo()
column = sp.ColumnParallelLinear(37, 250, axis=alone, name="up")
row = sp.RowParallelLinear(250, 9, axis=alone, name="down")
same = torch.equal(y, row(torch.relu(column(x))))
if axis.rank == 0:
    print(f"degree {axis.size} has the bits of degree 1: {same}")
dist.destroy_process_group()
if not same:
    raise SystemExit(1)
