"""How an activation (B, T, n) is cut along its T tokens, for sequence parallelism."""

from typing import Any

import torch

from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor
from shardproof.ops import unit_ops
from shardproof.ops.tokens import TokenCut
from shardproof.units import Block, CutDim, Shared, Units

UNITS = "tokens"  # name of the units
DIM = 1  # of the tokens in (B, T, n)


def tokens_of(x: Any) -> CutDim | None:
    """How the tokens of an activation are cut; None if they are not."""
    if not isinstance(x, CutTensor) or x.spec.dim != DIM or x.dim() != 3:
        return None
    return x.spec.cut if x.spec.cut.shared.units.name == UNITS else None


def is_to_be_cut(region: Region, x: Any) -> bool:
    """Whether an activation is cut along its tokens: (B, T, n) with a token, in training.

    Args:
        region: of the model.
        x: whole, or cut along its features.
    """
    if not region.cuts_tokens or not torch.is_grad_enabled():  # nothing is kept between blocks
        return False
    return x.dim() == DIM + 2 and all(x.shape[: DIM + 1])


def cut_of(region: Region, length: int) -> CutDim:
    """The cut of so many tokens over the ranks."""
    shared = Shared(Units(UNITS, length), region.scheme.leaves, region.axis.size)
    return region.one(CutDim(shared, (Block(length, 0, 1),)))


def token_cut(region: Region, cut: CutDim, who: str) -> TokenCut:
    """What operations on a rank's tokens need to know.

    Args:
        region: of the model.
        cut: of the tokens.
        who: name of the layer, for messages and the ledger.
    """
    split = region.place(cut, who).plain_split
    assert split is not None  # noqa: S101 - tokens are one block
    return TokenCut(split)


def own_tokens(region: Region, x: Any, who: str) -> Any:
    """A whole activation, cut along its tokens if it is to be cut.

    Args:
        region: of the model.
        x: (B, T, n), Replicate.
        who: name of the layer, for messages and the ledger.
    Comm:
        forward none; backward one all_gather of (B, T, n), if it is cut.
    """
    if isinstance(x, CutTensor) or not is_to_be_cut(region, x):
        return x
    cut = cut_of(region, x.shape[DIM])
    part = unit_ops.take(x, DIM, region.place(cut, who))
    return cut_tensor(part, region.spec(tuple(x.shape), DIM, cut), who)
