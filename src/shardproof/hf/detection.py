"""Telling a model of transformers from any other, without importing the library."""

import sys

from torch import nn


def is_transformers(model: nn.Module) -> bool:
    """True for a `PreTrainedModel`: whoever has one has imported transformers."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)
