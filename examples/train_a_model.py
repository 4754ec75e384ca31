"""Cut a model by a plan, train it with AdamW and clipping, and end with the same bits.

python examples/train_a_model.py
"""

import copy
import hashlib

import torch
from torch import Tensor, nn

import shardproof as sp  # before the first matrix product: it sets the BLAS mode

generator = torch.Generator().manual_seed(0)
x = torch.randn(64, 20, generator=generator)
target = torch.randint(0, 5, (64,), generator=generator)
whole = nn.Sequential(nn.Linear(20, 61), nn.SiLU(), nn.Linear(61, 33), nn.GELU(), nn.Linear(33, 5))
plan = {
    "0": sp.ColumnParallel(),
    "2": sp.RowParallel(),
    "4": sp.RowParallel(input_is_parallel=False),
}


def digest(tensor: Tensor) -> str:
    """First characters of a tensor's SHA-256."""
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()[:12]


def train(axis: sp.Axis) -> tuple[str, float]:
    """Ten steps on one rank; what the trained model says of x, and its loss."""
    model = sp.parallelize(copy.deepcopy(whole), plan, axis)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.zeros(())
    for _ in range(10):
        loss = sp.functional.cross_entropy(model(x), target)
        loss.backward()
        sp.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return digest(model(x)), loss.item()


seen = set()
for degree in (1, 2, 3, 8):
    outputs, loss = sp.launch(train, degree=degree)[0]
    seen.add((outputs, loss))
    print(f"degree {degree}: loss {loss:.6f}, outputs {outputs}")
print(f"the same bits at every degree: {len(seen) == 1}")
if len(seen) != 1:
    raise SystemExit(1)
