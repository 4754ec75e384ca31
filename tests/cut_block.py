"""A small block, its cut twin, and one run at every degree."""

from collections.abc import Callable

from torch import Tensor, nn

from invariance import bits_equal, normal
from places import Pool
from shardproof.axis import Axis
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, RowParallel

DEGREES = (3, 8)


class Block(nn.Module):
    """Column, ReLU, row."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(14, 35)
        self.act = nn.ReLU()
        self.down = nn.Linear(35, 14)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 4

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


PLAN = {"up": ColumnParallel(), "down": RowParallel()}


def cut_block(axis: Axis) -> nn.Module:
    return parallelize(Block(), PLAN, axis)


def data() -> tuple[Tensor, Tensor]:
    return normal(2, 5, 14, seed=8).requires_grad_(), normal(2, 5, 14, seed=9)


def calls(axis: Axis) -> dict[str, int]:
    """Collectives so far, by direction."""
    found = {"forward": 0, "backward": 0}
    for direction, _, count in axis.transport.ledger:
        found[direction] = count.calls
    return found


def parts(block: nn.Module) -> list[Tensor]:
    """What every rank has alike: the replicated bias's gradient."""
    return [block.down.bias.grad]


def run_everywhere(pool: Pool, run: Callable[[Axis], list[Tensor]]) -> list[Tensor]:
    """`run` at every degree; all must have the bits of degree 1, which are returned."""
    (alone,) = pool(1, "threads").run(run)
    for degree in DEGREES:
        for rank, found in enumerate(pool(degree, "threads").run(run)):
            assert len(found) == len(alone)
            for number, (a, b) in enumerate(zip(found, alone, strict=True)):
                assert bits_equal(a, b), f"tensor {number} on rank {rank} of {degree}"
    return alone
