"""Inputs of a model of transformers, made from its configuration and its forward's parameters."""

import inspect
from typing import Any

import torch
from torch import nn

from zoo.example import BATCH, LENGTH

LOWEST_TOKEN = 30  # smaller ones mean something to some model: padding, an image, an end


def inputs_of(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """Named arguments for `model.forward`, on the CPU, floats in fp32.

    Labels are among them where the model takes them.
    """
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    vocabulary = _vocabulary(config)
    found: dict[str, Any] = {}
    if main == "pixel_values":
        found["pixel_values"] = _picture(config, generator)
    elif main == "input_ids":
        found["input_ids"] = _tokens(vocabulary, generator)
    if "labels" in takes:
        classes = getattr(config, "num_labels", 2)
        found["labels"] = (
            torch.arange(BATCH) % classes if main == "pixel_values" else _tokens(vocabulary, generator)
        )
    elif "decoder_input_ids" in takes:
        found["decoder_input_ids"] = _tokens(vocabulary, generator)
    return found


def _vocabulary(config: Any) -> int:
    inner = config.get_text_config()
    return getattr(inner, "vocab_size", None) or getattr(config, "vocab_size", None) or 251


def _tokens(vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(LOWEST_TOKEN, vocabulary, (BATCH, LENGTH), generator=generator)


def _picture(config: Any, generator: torch.Generator) -> torch.Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.randn(BATCH, channels, height, width, generator=generator)
