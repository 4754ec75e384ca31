"""Refuse methods of transformers that need whole weights, and say what to do instead."""

import functools
from typing import Any, NoReturn

from torch import nn

from shardproof.errors import UsageError
from shardproof.hf.detection import is_transformers
from shardproof.layers.base import ShardedModule

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
_FILLED = (
    "transformers fills nn.Linear and nn.Embedding, passes over the layers that are cut, and would "
    "leave them as they are. Let it fill the model before it is cut; or build and cut the model on "
    "the meta device and call shardproof.initialize(model)."
)
# Method -> why it is refused, and what to do instead.
_REFUSED = {
    "save_pretrained": _CHECKPOINT,
    "push_to_hub": _CHECKPOINT,
    "resize_token_embeddings": (
        f"{_PART}, and its rows of the vocabulary would be others. Call it before parallelize."
    ),
    "add_adapter": _ADAPTER,
    "load_adapter": _ADAPTER,
    "init_weights": _FILLED,
    "initialize_weights": _FILLED,
}


def guard_methods(model: nn.Module) -> None:
    """Let cut models of transformers refuse the methods that they cannot support.

    Args:
        model: a cut model of transformers, or one that contains such models.
    """
    for module in model.modules():
        if is_transformers(module) and _is_cut(module):
            for method, why in _REFUSED.items():
                if hasattr(module, method):
                    sentence = f"{method} of a cut {type(module).__name__}: {why}"
                    setattr(module, method, functools.partial(_refuse, sentence))


def _is_cut(model: nn.Module) -> bool:
    """Whether some weight of `model` is cut."""
    return any(isinstance(module, ShardedModule) for module in model.modules())


def _refuse(sentence: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(sentence)
