"""Let `num_parameters` of a cut model of transformers count the whole model."""

import functools
from typing import Any

from torch import nn

from shardproof import reductions
from shardproof.hf.detection import is_transformers
from shardproof.layers.embedding import VocabParallelEmbedding


def count_whole(model: nn.Module) -> None:
    """Let `num_parameters` count the whole model.

    Args:
        model: a cut model of transformers, or one that contains such models.
    """
    for module in model.modules():
        if is_transformers(module):
            own: Any = module
            own.num_parameters = functools.partial(_num_parameters, module)


def _num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """`num_parameters` of transformers, for the whole model."""
    embeddings = {
        id(module.weight): module  # a tied weight counts once
        for module in model.modules()
        if exclude_embeddings and isinstance(module, nn.Embedding | VocabParallelEmbedding)
    }
    return reductions.num_parameters(model, only_trainable=only_trainable) - sum(
        reductions.num_parameters(each, only_trainable=only_trainable)
        for each in embeddings.values()
    )
