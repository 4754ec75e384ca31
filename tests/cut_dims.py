"""What tests of crossings share: dims cut by units, ranks of every degree, and their judges."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from invariance import bits_equal
from places import Pool
from shardproof.axis import Axis
from shardproof.ops.unit_moves import gather, held_part
from shardproof.ops.unit_split import UnitSplit
from shardproof.scheme import Numerics, Scheme
from shardproof.units import Block, CutDim, Shared, Units

DEGREES = (1, 3, 8)
ALL_DEGREES = (1, 2, 3, 5, 8)
WIDTH = 19  # of what is whole: divides nothing


@dataclass(frozen=True)
class Dim:
    """A cut dim at any degree."""

    units: Units
    blocks: tuple[Block, ...]

    def place(self, axis: Axis, *, numerics: Numerics = "invariant", leaves: int = 8) -> UnitSplit:
        cut_dim = CutDim(Shared(self.units, leaves, axis.size), self.blocks)
        return UnitSplit.of(axis, cut_dim, Scheme(leaves=leaves, numerics=numerics), "layer")

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)


HEADS = Units("heads", 6, ((0, 1, 2), (3, 4, 5)))
ONE_KEY = Units("heads", 4, ((0, 1, 2, 3),))
FEATURES = Units("features", 29)
DIMS = {
    "features": Dim(FEATURES, (Block(29, 0, 1),)),
    "even": Dim(Units("even", 16), (Block(48, 0, 3),)),
    "heads": Dim(Units("heads", 5), (Block(15, 0, 3),)),
    "fused": Dim(HEADS, (Block(24, 0, 4), Block(8, 6, 4), Block(8, 6, 4))),
    "keys": Dim(HEADS, (Block(6, 6, 3),)),
    "one key": Dim(ONE_KEY, (Block(12, 0, 3), Block(3, 4, 3), Block(3, 4, 3))),
    "gate and up": Dim(FEATURES, (Block(29, 0, 1), Block(29, 0, 1))),
    "mixed": Dim(HEADS, tuple(Block(2 * n, u, n) for u, n in ((0, 4), (6, 3), (2, 4), (4, 4)))),
    "scattered": Dim(Units("columns", 7), tuple(Block(7, 0, 1) for _ in range(9))),
    "one": Dim(Units("one", 1), (Block(3, 0, 3),)),
}
EACH = pytest.mark.parametrize("dim", list(DIMS.values()), ids=list(DIMS))
# Every dim where sums are rounded; formulas to their last digits, and narrow numbers, on some.
_TYPED = [
    *[(name, torch.float32) for name in DIMS],
    *[(name, torch.float64) for name in ("features", "fused", "mixed", "one")],
    *[(name, torch.bfloat16) for name in ("fused", "scattered")],
]
EACH_TYPED = pytest.mark.parametrize(
    ("dim", "dtype"),
    [pytest.param(DIMS[name], dtype, id=f"{name}-{dtype}") for name, dtype in _TYPED],
)

Results = dict[str, Tensor]
Step = Callable[[Axis], Results]


def whole_of(x: Tensor, dim: int, place: UnitSplit) -> Tensor:
    """A cut tensor put together; every holder has the same, or this raises."""
    y, x = gather(x.detach(), dim, place), x.detach()
    mine = held_part(y, dim, place)
    if place.arithmetic.is_invariant:
        assert bits_equal(mine, x), "a holder has other numbers than the owner"
    else:
        torch.testing.assert_close(mine, x)
    return y


def same_at_every_degree(pool: Pool, step: Step, degrees: Sequence[int] = DEGREES) -> Results:
    """Run on the ranks of every degree; all must have the bits of degree 1, which come back."""
    first: Results = {}
    for degree in degrees:
        for found in pool(degree, "threads").run(step):
            first = first or found
            assert found.keys() == first.keys()
            for name, value in found.items():
                assert bits_equal(value, first[name]), f"{name} differs at degree {degree}"
    return first


def agrees(found: Results, wanted: Results, tolerance: float = 1e-12) -> None:
    """Equal to plain torch, relative to the largest number."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        if value.numel():
            scale = float(value.abs().max()) + 1e-300
            assert float((found[name] - value).abs().max()) <= tolerance * scale, name


def gradients(y: Tensor, grad_y: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of all inputs, zeros where there is none."""
    found = torch.autograd.grad(y, inputs, grad_y, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()
