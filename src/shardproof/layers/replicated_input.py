"""A module whose input must be the same on all ranks says so, once, instead of going wrong."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis


class SameOnAllRanks:
    """A forward pre-hook: the first input in training must be Replicate.

    Args:
        axis: the axis whose ranks compare the input.
        who: the module's name.

    The ranks exchange a hash, in direction "setup", at the first call in training. Later inputs are
    noted, and compared by the next exchange.
    """

    def __init__(self, axis: Axis, who: str) -> None:
        self.axis = axis
        self.who = who
        self._is_checked = False

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Compare the ranks' inputs.

        Raises:
            MismatchError: on all ranks, if one has another input.
        """
        if self.axis.size == 1 or not module.training:
            return
        if self._is_checked:
            self.axis.note(inputs[0], who=self.who)
            return
        self.axis.agree(
            {f"the input of {self.who!r}": _hash(inputs[0])},
            what="activations",
            way_out=f"{self.who!r} ({type(module).__name__}) gets an activation that is cut, and "
            "would treat the parts of all ranks alike. Put it behind the row-parallel linear, or "
            "between its neighbours in one nn.Sequential, where it is seen.",
        )
        self._is_checked = True


@torch.no_grad()
def _hash(x: Tensor) -> str:
    data = x.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return f"{tuple(x.shape)} {hashlib.sha256(data.numpy().data).hexdigest()[:16]}"
