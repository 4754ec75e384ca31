"""An example of what a model of transformers takes, from its config: for watching one forward."""

import inspect
from typing import Any

import torch
from torch import nn

from shardproof.errors import PlanError

_BATCH, _LENGTH = 2, 16


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Named arguments of `model.forward`: token ids with labels, or an image.

    Args:
        model: of transformers, also on the meta device.

    Raises:
        PlanError: the model takes something else.
    """
    own: Any = model
    config, main = own.config, own.main_input_name
    takes = inspect.signature(own.forward).parameters
    text = config.get_text_config()
    found: dict[str, Any] = {}
    if main == "input_ids":
        most = int(getattr(text, "max_position_embeddings", _LENGTH) or _LENGTH)
        found["input_ids"] = _ids(text.vocab_size, min(_LENGTH, most))
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            found["decoder_input_ids"] = _ids(text.vocab_size, 8)
        elif "labels" in takes:
            found["labels"] = found["input_ids"].clone()
        if getattr(config, "is_encoder_decoder", False) and "labels" in takes:
            found["labels"] = found["decoder_input_ids"].clone()
            del found["decoder_input_ids"]
    elif main == "pixel_values":
        height, width = _pair(getattr(config, "image_size", 224))
        found["pixel_values"] = torch.zeros(
            _BATCH, getattr(config, "num_channels", 3), height, width
        )
    else:
        raise PlanError(
            f"{type(model).__name__} takes {main!r}, of which its config gives no example. Give "
            "one: plan(model, degree=..., inputs={...}), as forward takes it."
        )
    return found


def _ids(vocabulary: int, length: int) -> torch.Tensor:
    return torch.arange(_BATCH * length).reshape(_BATCH, length) % vocabulary


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, list | tuple) else (int(size), int(size))
