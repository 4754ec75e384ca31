"""Write the configs of a model of transformers beside its weights."""

import copy
from pathlib import Path
from typing import Any

from shardproof.wording import dtype_name


def write_configs(model: Any, folder: Path) -> None:
    """Write config.json, and generation_config.json if the model generates.

    Args:
        model: of transformers, cut or not.
        folder: the directory.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [getattr(model, "whole_class", type(model)).__name__]
    config.dtype = dtype_name(model.dtype)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
