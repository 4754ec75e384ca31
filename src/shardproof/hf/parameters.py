"""How many parameters a cut model of transformers says that it has."""

import functools
from typing import Any

from torch import nn

from shardproof import reductions
from shardproof.hf.detection import is_transformers
from shardproof.layers.embedding import VocabParallelEmbedding


def count_whole(model: nn.Module) -> None:
    """Let `num_parameters` count the whole model.

    Args:
        model: cut; of transformers, or with models of transformers inside, which count too.
    """
    for module in model.modules():
        if is_transformers(module):
            own: Any = module
            own.num_parameters = functools.partial(_num_parameters, module)


def _num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As of transformers, for the whole model."""
    embeddings = {
        id(module.weight): module  # a weight that several share counts once
        for module in model.modules()
        if exclude_embeddings and isinstance(module, nn.Embedding | VocabParallelEmbedding)
    }
    return reductions.num_parameters(model, only_trainable=only_trainable) - sum(
        reductions.num_parameters(each, only_trainable=only_trainable)
        for each in embeddings.values()
    )
