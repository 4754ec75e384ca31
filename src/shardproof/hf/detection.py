"""Recognise a model of transformers without importing that library."""

import sys

from torch import nn


def is_transformers(model: nn.Module) -> bool:
    """Whether a model is a `PreTrainedModel`; if so, transformers was imported already."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether a class is the `Conv1D` of GPT-2: a linear with a transposed weight."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and kind is library.Conv1D
