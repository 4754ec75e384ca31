"""What some types of models need beside, or in the place of, what all are given."""

from collections.abc import Callable
from typing import Any

import torch

from zoo.example import BATCH
from zoo.maker import Maker
from zoo.tower_inputs import TOWERS


def _codebooks(maker: Maker) -> dict[str, Any]:
    books = maker.config.num_codebooks
    return {
        "input_ids": maker.tokens(BATCH * books, maker.length),
        "labels": maker.tokens(BATCH, maker.length, books),
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


SPECIAL: dict[str, Callable[[Maker], dict[str, Any]]] = TOWERS | {
    "git": lambda maker: {"pixel_values": maker.picture()},
    "led": _global_places,
    "longformer": _global_places,
    "luke": _entities,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "siglip2": _patches,
    "whisper": lambda maker: {"encoder_outputs": (maker.floats(BATCH, 7, maker.config.d_model),)},
}
