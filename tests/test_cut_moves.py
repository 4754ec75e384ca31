"""Operations that only move data: recipes found on numbers, for every rank, against torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardproof.axis import Axis
from shardproof.cut import all_rules
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor
from shardproof.scheme import Scheme
from shardproof.transport.rehearsed import RehearsedTransport
from shardproof.units import Block, CutDim, Shared, Units

assert all_rules
DEGREES = (1, 2, 3, 5, 8)
HEADS = Units("heads", 6)
GROUPS = Units("groups", 6, ((0, 1, 2), (3, 4, 5)))
FUSED = (Block(24, 0, 4),) * 3
ONES = (Block(6, 0, 1),)
Op = Callable[[Any], Any]

# Name, operation, shape, cut dim, blocks, units.
MOVES: list[tuple[str, Op, tuple[int, ...], int, tuple[Block, ...], Units]] = [
    ("heads", lambda x: x.view(2, 5, 6, 4), (2, 5, 24), 2, (Block(24, 0, 4),), HEADS),
    ("split", lambda x: x.split(24, dim=2), (2, 5, 72), 2, FUSED, HEADS),
    ("chunk", lambda x: x.chunk(3, -1), (2, 5, 72), 2, FUSED, HEADS),
    ("three", lambda x: x.view(2, 5, 3, 6, 4), (2, 5, 72), 2, FUSED, HEADS),
    (
        "three in front",
        lambda x: x.view(2, 5, 3, 6, 4).permute(2, 0, 3, 1, 4).unbind(0),
        (2, 5, 72),
        2,
        FUSED,
        HEADS,
    ),
    (
        "interleaved",
        lambda x: x.view(2, 5, 6, 12).chunk(3, dim=-1),
        (2, 5, 72),
        2,
        (Block(72, 0, 12),),
        HEADS,
    ),
    ("merge", lambda x: x.transpose(1, 2).reshape(2, 5, 24), (2, 6, 5, 4), 1, ONES, HEADS),
    ("merge batch", lambda x: x.reshape(12, 5, 4), (2, 6, 5, 4), 1, ONES, HEADS),
    ("and back", lambda x: x.reshape(12, 5, 4).view(2, 6, 5, 4), (2, 6, 5, 4), 1, ONES, HEADS),
    (
        "repeat_kv",
        lambda x: x[:, :, None].expand(2, 2, 3, 5, 4).reshape(2, 6, 5, 4),
        (2, 2, 5, 4),
        1,
        (Block(2, 6, 1),),
        GROUPS,
    ),
    (
        "repeat_interleave",
        lambda x: x.repeat_interleave(3, 1),
        (2, 2, 5, 4),
        1,
        (Block(2, 6, 1),),
        GROUPS,
    ),
    ("flatten", lambda x: x.flatten(2), (2, 5, 6, 4), 2, ONES, HEADS),
    ("every second", lambda x: x[..., ::2], (2, 12), 1, (Block(12, 0, 2),), HEADS),
    ("half", lambda x: x[..., :12], (2, 5, 24), 2, (Block(24, 0, 4),), HEADS),
    ("mixed slices", lambda x: x[:, 1:4, ::2, :3], (2, 6, 5, 4), 1, ONES, HEADS),
    ("halves of heads", lambda x: (x[..., :2], x[..., 2:]), (2, 6, 5, 4), 1, ONES, HEADS),
    ("flip", lambda x: x.flip(1), (2, 6, 5, 4), 1, ONES, HEADS),
    ("roll", lambda x: torch.roll(x, 1, 1), (2, 6, 5, 4), 1, ONES, HEADS),
    ("last token", lambda x: x[:, :, -1], (2, 6, 5, 4), 1, ONES, HEADS),
    ("new dims", lambda x: x[:, None, :, None, -1:], (2, 6, 5, 4), 1, ONES, HEADS),
    ("windows", lambda x: x.unfold(2, 2, 1), (2, 6, 5), 1, ONES, HEADS),
    ("tokens", lambda x: tuple(x.unbind(2)), (2, 6, 5, 4), 1, ONES, HEADS),
    ("transposed", lambda x: x.T, (6, 5), 0, ONES, HEADS),
    ("one dim", lambda x: x.reshape(-1), (2, 6, 5), 1, ONES, HEADS),
    ("moved", lambda x: x.movedim(1, -1), (2, 6, 5), 1, ONES, HEADS),
    ("repeated", lambda x: x.repeat(2, 1, 3), (2, 6, 5), 1, ONES, HEADS),
    ("repeated cut dim", lambda x: x.repeat(1, 2, 1), (2, 6, 5), 1, ONES, HEADS),
    ("unflatten", lambda x: x.unflatten(-1, (6, 4)), (2, 5, 24), 2, (Block(24, 0, 4),), HEADS),
    ("rows of none", lambda x: x.view(0, 5, 6, 4), (0, 5, 24), 2, (Block(24, 0, 4),), HEADS),
]


def cut_for(x: Tensor, dim: int, cut: CutDim, rank: int, degree: int) -> CutTensor:
    region = Region(Axis("tp", RehearsedTransport(rank, degree)), Scheme())
    held = torch.from_numpy(cut.held(rank))
    part = x.detach().index_select(dim, held).requires_grad_()
    return cut_tensor(part, region.spec(tuple(x.shape), dim, cut))


def as_list(y: Any) -> list[Any]:
    return list(y) if isinstance(y, tuple | list) else [y]


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("case", MOVES, ids=lambda case: case[0])
def test_each_rank_moves_its_part(case: Any, degree: int) -> None:
    _, op, shape, dim, blocks, units = case
    cut = CutDim(Shared(units, 8, degree), blocks)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = as_list(op(x))
    for rank in range(degree):
        given = cut_for(x, dim, cut, rank, degree)
        found = as_list(op(given))
        assert given.spec.region.gathered == {} or not x.numel()
        for ours, theirs in zip(found, wanted, strict=True):
            if not isinstance(ours, CutTensor):
                assert not x.numel()  # of nothing, nothing is a part
                continue
            assert ours.shape == theirs.shape
            held = torch.from_numpy(ours.spec.cut.held(rank))
            assert torch.equal(ours.local, theirs.detach().index_select(ours.spec.dim, held))


@pytest.mark.parametrize("degree", DEGREES[1:])
@pytest.mark.parametrize(
    "op",
    [
        lambda x: x[:, :, None].expand(2, 6, 7, 5, 31),
        lambda x: x.repeat(1, 1, 7, 1),
        lambda x: x.repeat_interleave(7, 2),
        lambda x: x[..., [0, 0, 1, 2, 2]],
    ],
    ids=["expand", "repeat", "repeat_interleave", "numbers twice"],
)
def test_gradients_of_what_repeats_are_added_in_one_order(op: Op, degree: int) -> None:
    x = torch.randn(2, 6, 5, 31, generator=torch.Generator().manual_seed(1))
    alone = cut_for(x, 1, CutDim(Shared(HEADS, 8, 1), ONES), 0, 1)
    y = op(alone)
    # Torch's own sum depends on how memory lies.
    swapped = y.local.transpose(-1, -2).shape
    gradient = torch.randn(swapped, generator=torch.Generator().manual_seed(2)).transpose(-1, -2)
    y.local.backward(gradient)
    assert alone.local.grad is not None
    cut = CutDim(Shared(HEADS, 8, degree), ONES)
    for rank in range(degree):
        mine = cut_for(x, 1, cut, rank, degree)
        made = op(mine)
        held = torch.from_numpy(made.spec.cut.held(rank))
        made.local.backward(gradient.index_select(made.spec.dim, held))
        place = torch.from_numpy(cut.held(rank))
        assert torch.equal(mine.local.grad, alone.local.grad.index_select(1, place))
