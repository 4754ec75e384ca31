"""Inputs of a model of transformers, made from its configuration and its forward's parameters."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.example import BATCH, LENGTH

LOWEST_TOKEN = 30  # smaller ones mean something to some model: padding, an image, an end


LENGTHS = {"reformer": 12}  # the product of the sides of its table of places


def inputs_of(
    model: nn.Module, generator: torch.Generator, *, of_classes: bool
) -> dict[str, Any]:
    """Named arguments for `model.forward`, on the CPU, floats in fp32.

    Labels are among them where the model takes them: one class a line of the batch where
    `of_classes` is true, else one token for each place.
    """
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    kind = config.model_type
    maker = Maker(config, generator, LENGTHS.get(kind, LENGTH))
    found: dict[str, Any] = {}
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
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
    return found


def _has_cross_attention(model: nn.Module) -> bool:
    return any("encoder_attn" in name or "cross_attn" in name for name, _ in model.named_modules())


def _width(config: Any) -> int:
    return getattr(config, "cross_attention_hidden_size", None) or config.hidden_size


class Maker:
    """Draws inputs that fit a configuration.

    Attributes:
        config: of the model.
        length: of a sequence.
    """

    def __init__(self, config: Any, generator: torch.Generator, length: int) -> None:
        self.config = config
        self.length = length
        self._generator = generator

    def tokens(self, *shape: int) -> Tensor:
        """(batch, length) unless `shape` says otherwise; none of them means anything special."""
        inner = self.config.get_text_config()
        vocabulary = getattr(inner, "vocab_size", None) or 251
        lowest = min(LOWEST_TOKEN, vocabulary // 2)
        shape = shape or (BATCH, self.length)
        return torch.randint(lowest, vocabulary, shape, generator=self._generator)

    def floats(self, *shape: int) -> Tensor:
        """Normal numbers of `shape`."""
        return torch.randn(shape, generator=self._generator)

    def classes(self) -> Tensor:
        """(batch,), the first classes in turn."""
        return torch.arange(BATCH) % self.config.num_labels

    def picture(self) -> Tensor:
        """(batch, channels, height, width)."""
        config = getattr(self.config, "vision_config", self.config)
        size = getattr(config, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return self.floats(BATCH, getattr(config, "num_channels", 3), height, width)


def _codebooks(maker: Maker) -> dict[str, Any]:
    books = maker.config.num_codebooks
    return {
        "input_ids": maker.tokens(BATCH * books, maker.length),
        "labels": maker.tokens(BATCH, maker.length, books),
    }


def _shared_keys(maker: Maker) -> dict[str, Any]:
    """Keys and values that another model computed, for each kind of attention."""
    text = maker.config.text_config
    given: dict[str, Any] = {}
    for kind, heads, size in (
        ("sliding_attention", text.num_key_value_heads, text.head_dim),
        (
            "full_attention",
            text.num_global_key_value_heads or text.num_key_value_heads,
            text.global_head_dim or text.head_dim,
        ),
    ):
        given[kind] = tuple(maker.floats(BATCH, heads, maker.length, size) for _ in range(2))
    return {
        "inputs_embeds": maker.floats(BATCH, maker.length, 2 * maker.config.backbone_hidden_size),
        "shared_kv_states": given,
    }


def _patches(maker: Maker) -> dict[str, Any]:
    """Pictures that are cut into patches already."""
    vision = maker.config.vision_config
    side = int(vision.num_patches**0.5)
    features = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": maker.floats(BATCH, vision.num_patches, features),
        "pixel_attention_mask": torch.ones(BATCH, vision.num_patches, dtype=torch.long),
        "spatial_shapes": torch.full((BATCH, 2), side),
    }


def _entities(maker: Maker) -> dict[str, Any]:
    """Things that a text names, and where it names them."""
    places = torch.full((BATCH, 3, maker.length), -1)
    for entity in range(3):
        places[:, entity, :2] = torch.tensor([entity, entity + 3])
    return {
        "entity_ids": torch.arange(BATCH * 3).view(BATCH, 3) + 5,
        "entity_attention_mask": torch.ones(BATCH, 3, dtype=torch.long),
        "entity_position_ids": places,
    }


def _global_places(maker: Maker) -> dict[str, Any]:
    """The first place attends to all and all attend to it."""
    mask = torch.zeros(BATCH, maker.length, dtype=torch.long)
    mask[:, 0] = 1
    return {"global_attention_mask": mask}


# By type of model: what it needs beside, or in the place of, what all are given.
SPECIAL: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "gemma4_assistant": _shared_keys,
    "gemma4_unified_assistant": _shared_keys,
    "git": lambda maker: {"pixel_values": maker.picture()},
    "led": _global_places,
    "longformer": _global_places,
    "luke": _entities,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "siglip2": _patches,
}
