"""What a cut model of transformers cannot save: a checkpoint that any degree can read."""

import functools
from typing import Any, NoReturn

from torch import nn

from shardproof.errors import UsageError


def guard_saving(model: nn.Module) -> None:
    """Let `model.save_pretrained` refuse: a rank has a part of the weights, and layouts."""
    model.save_pretrained = functools.partial(  # type: ignore[assignment]
        _refuse, type(model).__name__
    )


def _refuse(kind: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        f"save_pretrained of a cut {kind}: a rank has only its part of the weights, and "
        "checkpoints that any degree can read are not supported yet. Let every rank write "
        "torch.save(model.state_dict(), FILE) to a file of its own: it loads at the same degree "
        "and rank."
    )
