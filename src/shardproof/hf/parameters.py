"""What a cut model of transformers says of its parameters: how many, and what they start as."""

import functools
from typing import Any, NoReturn

import torch
from torch import nn

from shardproof.errors import UsageError
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.optim import layouts_of

_STARTS = ("init_weights", "initialize_weights")


def guard_parameters(model: nn.Module) -> None:
    """Let `num_parameters` count the whole model, and `init_weights` refuse.

    Args:
        model: of transformers, cut; of every model of transformers inside it too.
    """
    for module in model.modules():
        if hasattr(module, "num_parameters") and hasattr(module, "config"):
            own: Any = module
            own.num_parameters = functools.partial(_num_parameters, module)
            for name in _STARTS:
                setattr(own, name, functools.partial(_refuse, name, type(module).__name__))


def _num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As of transformers, for the whole model."""
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if exclude_embeddings and isinstance(module, nn.Embedding | VocabParallelEmbedding)
    }
    return sum(
        torch.Size(layout.shape).numel()
        for _, parameter, layout, _ in layouts_of(model)
        if id(parameter) not in embeddings and (parameter.requires_grad or not only_trainable)
    )


def _refuse(function: str, kind: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        f"{function} of a cut {kind}: transformers fills nn.Linear and nn.Embedding, passes over "
        "the layers that are cut, and would leave them as they are. Let it fill the model before "
        "it is cut; or build and cut the model on the meta device and call "
        "shardproof.initialize(model)."
    )
