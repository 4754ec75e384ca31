"""Methods of transformers that know whole weights only, and what to do instead of calling them."""

import functools
from typing import Any, NoReturn

from torch import nn

from shardproof.errors import UsageError

_PART = "a rank has only its part of the weights"
_CHECKPOINT = (
    f"{_PART}, and checkpoints that any degree can read are not supported yet. Let every rank "
    "write torch.save(model.state_dict(), FILE) to a file of its own: it loads at the same degree "
    "and rank."
)
_ADAPTER = (
    "adapters on weights that are cut are not supported yet. Merge the adapter into the model "
    "before parallelize, or leave the layers that it changes out of the plan and add it before."
)
# Method -> why not, and what to do instead.
_REFUSED = {
    "save_pretrained": _CHECKPOINT,
    "push_to_hub": _CHECKPOINT,
    "resize_token_embeddings": (
        f"{_PART}, and its rows of the vocabulary would be others. Call it before parallelize."
    ),
    "add_adapter": _ADAPTER,
    "load_adapter": _ADAPTER,
}


def guard_methods(model: nn.Module) -> None:
    """Let a cut model refuse what it cannot do."""
    for method, why in _REFUSED.items():
        if hasattr(model, method):
            refuse = functools.partial(_refuse, f"{method} of a cut {type(model).__name__}: {why}")
            setattr(model, method, refuse)


def _refuse(sentence: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(sentence)
