"""The numbers of small tensors, kept for those who want to look at them (`prove --show`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shardproof import comm
from shardproof.axis import Axis
from shardproof.leaves import Layout
from shardproof.prover.hashing import owned_part
from shardproof.prover.printed import TWO
from shardproof.runs import join

FEW = 100  # numbers of the largest tensor that is kept

Numbers = tuple[Any, ...] | float | int | bool  # nested as the tensor is


@dataclass(frozen=True)
class Kept:
    """What one rank keeps of a tensor.

    Attributes:
        shape: of what it holds.
        ours: the whole tensor, on rank 0, if it is small enough.
        torch: plain PyTorch's tensor, on rank 0; None if it has none.
    """

    shape: tuple[int, ...]
    ours: Tensor | None = None
    torch: Tensor | None = None


@dataclass(frozen=True)
class Shown:
    """A tensor as a report shows it.

    Attributes:
        held: degree -> the shape that each rank holds.
        ours, torch: the numbers; None of large tensors, and of those that one side lacks.
        degree: at which ranks made `ours`: 2 if that was run, or the lowest.
    """

    held: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    ours: Numbers | None = None
    torch: Numbers | None = None
    degree: int = 1


def whole(tensor: Tensor, layout: Layout, axis: Axis, *, who: str) -> Tensor | None:
    """A small tensor in one piece.

    Args:
        tensor: layout.local_shape, Shard(layout.dim) or Replicate.
        layout: how it lies on this rank.
        axis: whose ranks hold it; all of them call this.
        who: what it is, for messages.
    Returns:
        layout.shape on rank 0; None on the others if it is sharded.
    Comm:
        gathers to rank 0 in direction "prover" if it is sharded.
    """
    part = owned_part(tensor.detach(), layout)
    if layout.cut is None or layout.dim is None or axis.size == 1:
        return part.clone()
    layouts = [layout.of(rank) for rank in range(axis.size)]
    shapes = [each.owned_shape for each in layouts]
    sizes = [math.prod(shape) for shape in shapes]
    flat = part.reshape(-1).contiguous()
    joined = comm.gather(flat, axis, sizes=sizes, dst=0, direction="prover", who=who)
    if joined is None:
        return None
    pieces = [each.view(shape) for each, shape in zip(joined.split(sizes), shapes, strict=True)]
    return join(pieces, layout.dim, [each.owned_runs for each in layouts])


def shown(kept: Mapping[int, Sequence[Kept | None]]) -> Shown | None:
    """What a report shows of one tensor.

    Args:
        kept: degree -> of every rank; the numbers are those of degree 2, which notebooks simulate,
            or of the lowest degree if 2 is not there.
    """
    found = {degree: [each for each in ranks if each] for degree, ranks in kept.items()}
    found = {degree: ranks for degree, ranks in found.items() if ranks}
    if not found:
        return None
    degree = TWO if TWO in found else next(iter(found))
    first = found[degree][0]
    held = {str(degree): tuple(each.shape for each in ranks) for degree, ranks in found.items()}
    return Shown(held, _numbers(first.ours), _numbers(first.torch), degree)


def _numbers(tensor: Tensor | None) -> Numbers | None:
    return None if tensor is None else _frozen(tensor.cpu().tolist())


def _frozen(tree: Any) -> Any:
    return tuple(map(_frozen, tree)) if isinstance(tree, list) else tree
