"""Methods of transformers that know whole weights only, and what a cut model does for them."""

import functools
import math
from typing import Any, NoReturn

from torch import nn

from shardproof import optim
from shardproof.errors import UsageError
from shardproof.layers.embedding import VocabParallelEmbedding

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
    """Let a cut model refuse what it cannot do, and count its parameters as those of the whole."""
    for method, why in _REFUSED.items():
        if hasattr(model, method):
            refuse = functools.partial(_refuse, f"{method} of a cut {type(model).__name__}: {why}")
            setattr(model, method, refuse)
    if hasattr(model, "num_parameters"):
        model.num_parameters = functools.partial(_count, model)  # type: ignore[assignment]


def _refuse(sentence: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(sentence)


def _count(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Parameters of the whole model, each counted once; options as in transformers."""
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | VocabParallelEmbedding)
    }
    return sum(
        math.prod(layout.shape)
        for name, parameter, layout, _ in optim.layouts_of(model)
        if (parameter.requires_grad or not only_trainable)
        and not (exclude_embeddings and name in embeddings)
    )
