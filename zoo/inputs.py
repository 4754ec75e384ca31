"""Inputs of a model of transformers, made from its configuration and its forward's parameters."""

import inspect
from typing import Any

import torch
from torch import nn

from zoo.example import BATCH, LENGTH
from zoo.maker import Maker
from zoo.special import SPECIAL

LENGTHS = {"reformer": 12}  # the product of the sides of its table of places


def inputs_of(model: nn.Module, generator: torch.Generator, *, of_classes: bool) -> dict[str, Any]:
    """Named arguments for `model.forward`, on the CPU, floats in fp32.

    Labels are among them where the model takes them: one class a line of the batch where
    `of_classes` is true, else one token for each place.
    """
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    kind = config.model_type
    maker = Maker(config, generator, LENGTHS.get(kind, LENGTH))
    found: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or (of_classes and main == "inputs"):
        found["pixel_values"] = maker.picture()
    else:
        found["input_ids"] = maker.tokens()
    if "labels" in takes:
        found["labels"] = maker.classes() if of_classes else maker.tokens()
    elif "decoder_input_ids" in takes:
        found["decoder_input_ids"] = maker.tokens()
    if "encoder_hidden_states" in takes and _has_cross_attention(model):
        found["encoder_hidden_states"] = maker.floats(BATCH, 7, _width(config))
    if kind in SPECIAL:
        found |= SPECIAL[kind](maker)
    return {key: value for key, value in found.items() if value is not None}


def _has_cross_attention(model: nn.Module) -> bool:
    return any("encoder_attn" in name or "cross_attn" in name for name, _ in model.named_modules())


def _width(config: Any) -> int:
    return getattr(config, "cross_attention_hidden_size", None) or config.hidden_size
