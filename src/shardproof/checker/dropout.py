"""Whether dropout is drawn alike on ranks with the same elements, and apart on the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.checker import mistake_kinds as kinds
from shardproof.checker.judging import Judge
from shardproof.checker.placement import REPLICATE, SHARD, FoundPlacement, place
from shardproof.checker.step_recording import Recording

_FEW = 16  # elements: masks of fewer can be alike by chance


@dataclass(frozen=True)
class DropoutFault:
    """A dropout that is drawn wrongly.

    Attributes:
        kind: "dropout alike" or "dropout apart".
        module: path of the module that draws.
        ranks: two ranks that show it.
        placement: of what elements are dropped of.
    """

    kind: str
    module: str
    ranks: tuple[int, int]
    placement: str

    @property
    def evidence(self) -> str:
        """What was compared, for people."""
        a, b = self.ranks
        masks = "the same" if self.kind == kinds.DROPOUT_ALIKE else "different"
        return f"its input is {self.placement}, and ranks {a} and {b} drop {masks} elements"


def find_dropout_fault(judge: Judge, drawn: Sequence[Recording]) -> DropoutFault | None:
    """The first dropout whose masks are wrong.

    Args:
        judge: of the runs without dropout, whose inputs say how they lie on the ranks.
        drawn: recordings of the ranks with dropout.
    """
    for number in range(min(len(each.draws) for each in drawn)):
        draws = [each.draws[number] for each in drawn]
        kept = [each.kept for each in draws]
        masks = [each for each in kept if each is not None]
        inputs = _inputs(judge, draws[0].path, draws[0].call)
        if inputs is None or len(masks) < len(kept):
            continue
        placement = inputs
        for rank in range(1, len(masks)):
            for other in range(rank):
                kind = _wrong(masks[other], masks[rank], placement, other, rank)
                if kind is not None:
                    return DropoutFault(kind, draws[0].path, (other, rank), str(placement))
    return None


def _inputs(judge: Judge, path: str, call: int) -> FoundPlacement | None:
    """How the input of a dropout lies; None where the plain module has no such dropout."""
    wholes = [x for x in judge.runs.reference.draws if x.path == path and x.call == call]
    locals_ = [
        next((x.x for x in each.draws if x.path == path and x.call == call), None)
        for each in judge.runs.ranks
    ]
    held = [each for each in locals_ if each is not None]
    if len(held) < judge.degree:
        return None
    if wholes:
        return place(held, wholes[0].x, judge.bound(wholes[0].x, "value"))
    if all(torch.equal(each, held[0]) for each in held):
        return FoundPlacement(REPLICATE, 0.0, held[0])
    return None


def _wrong(a: Tensor, b: Tensor, placement: FoundPlacement, rank_a: int, rank_b: int) -> str | None:
    if a.shape != b.shape or a.numel() < _FEW or bool(a.all()):
        return None
    is_alike = torch.equal(a, b)
    if placement.kind == SHARD and placement.indices is not None:
        # On a mesh of two dims, ranks can hold the same slice.
        is_same_slice = placement.indices[rank_a] == placement.indices[rank_b]
        if is_alike and not is_same_slice:
            return kinds.DROPOUT_ALIKE
        if not is_alike and is_same_slice:
            return kinds.DROPOUT_APART
    if placement.kind == REPLICATE and not is_alike:
        return kinds.DROPOUT_APART
    return None
