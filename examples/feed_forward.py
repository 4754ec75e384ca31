"""A feed-forward block cut over three ranks that are threads of this process, shape by shape.

python examples/feed_forward.py
"""

import torch
from torch import Tensor, nn

import shardproof as sp  # before the first matrix product: it sets the BLAS mode

HIDDEN = 10
generator = torch.Generator().manual_seed(0)
x = torch.randn(1, 5, HIDDEN, generator=generator)
up, down = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False), nn.Linear(4 * HIDDEN, HIDDEN, bias=False)


def work(axis: sp.Axis) -> tuple[str, Tensor]:
    """What one rank does: column then row, nothing gathered in between."""
    column = sp.ColumnParallelLinear.from_linear(up, axis=axis)
    row = sp.RowParallelLinear.from_linear(down, axis=axis)
    hidden = column(x)
    y = row(sp.functional.gelu(hidden))
    shapes = (
        f"rank {axis.rank}: up {tuple(column.weight.shape)}, hidden {tuple(hidden.shape)}, "
        f"down {tuple(row.weight.shape)}, {axis.transport.ledger.calls('forward', 'all_reduce')} "
        "all_reduce"
    )
    return shapes, y.detach()


(alone,) = sp.launch(work, degree=1)
for line, _ in sp.launch(work, degree=3):
    print(line)
same = all(torch.equal(y, alone[1]) for d in (2, 3, 8) for _, y in sp.launch(work, degree=d))
with torch.no_grad():
    apart = (alone[1] - down(nn.functional.gelu(up(x)))).abs().max().item()
print(f"degrees 2, 3 and 8 have the bits of degree 1: {same}")
print(f"max difference from plain torch: {apart:.1e}")
if not same or apart > 1e-6:
    raise SystemExit(1)
