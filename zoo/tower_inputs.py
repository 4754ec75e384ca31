"""Inputs for models with a tower: pictures or sounds, and a token for each of their places.

How many tokens a picture or a sound has follows from the small configurations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.example import BATCH
from zoo.maker import Maker


def _with_labels(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"labels": given["input_ids"]}


def _ones(*shape: int) -> Tensor:
    return torch.ones(BATCH, *shape, dtype=torch.long)


def _audio(tokens: int, frames: int = 40, mask: str | None = "input_features_mask") -> Any:
    """Of a tower that hears (batch, bins, frames) and makes `tokens` of it."""

    def made(maker: Maker) -> dict[str, Any]:
        config = maker.config
        token = getattr(config, "audio_token_id", None) or config.audio_token_index
        given = {"input_ids": maker.marked(token, tokens), "input_features": maker.sound(frames)}
        return _with_labels(given | ({mask: _ones(frames)} if mask else {}))

    return made


def _granite(maker: Maker) -> dict[str, Any]:
    return _with_labels(
        {
            "input_ids": maker.marked(maker.config.audio_token_index, 6),
            "input_features": maker.floats(BATCH, 12, 16),
            "input_features_mask": torch.ones(BATCH, 6, dtype=torch.bool),
        }
    )


def _nemotron(maker: Maker) -> dict[str, Any]:
    return _with_labels(
        {
            "input_ids": maker.marked(maker.config.audio_token_id, 5),
            "input_features": maker.floats(BATCH, 40, 16),
            "input_features_mask": _ones(40),
        }
    )


def _qwen_audio(maker: Maker) -> dict[str, Any]:
    given = _audio(10, mask="feature_attention_mask")(maker)
    return given | {"attention_mask": torch.ones_like(given["input_ids"])}


def _vibe(maker: Maker) -> dict[str, Any]:
    return _with_labels(
        {
            "input_ids": maker.marked(maker.config.audio_token_id, 5),
            "input_values": maker.floats(BATCH, 1, 20),
            "padding_mask": _ones(20),
            "sample": False,
        }
    )


def _realtime(maker: Maker) -> dict[str, Any]:
    """Each token is heard together with a part of the sound: 8 frames."""
    return {"input_features": maker.sound(8 * maker.length)}


def _fuyu(maker: Maker) -> dict[str, Any]:
    features = maker.config.patch_size**2 * maker.config.num_channels
    return _with_labels(
        {
            "input_ids": maker.marked(maker.config.image_token_id, 4),
            "image_patches": maker.floats(BATCH, 4, features),
        }
    )


def _gemma(maker: Maker) -> dict[str, Any]:
    token = maker.config.image_token_id
    ids = maker.marked(token, 4)
    return _with_labels(
        {"input_ids": ids, "pixel_values": maker.picture(), "token_type_ids": (ids == token).long()}
    )


def _shield(maker: Maker) -> dict[str, Any]:
    """It answers yes or no, and hands labels on to a model that would take them for tokens."""
    return _gemma(maker) | {"labels": None}


def _t5_gemma(maker: Maker) -> dict[str, Any]:
    token = maker.config.encoder.image_token_id
    return {"input_ids": maker.marked(token, 4), "pixel_values": maker.picture()}


def _picture_of(tokens: int, pictures: int | None = None) -> Any:
    """Of a tower that makes `tokens` of a picture; `pictures` where there may be several."""

    def made(maker: Maker) -> dict[str, Any]:
        seen = maker.picture()
        return _with_labels(
            {
                "input_ids": maker.marked(maker.config.image_token_id, tokens),
                "pixel_values": seen if pictures is None else seen.unsqueeze(1),
            }
        )

    return made


def _neomme(maker: Maker) -> dict[str, Any]:
    return _with_labels(
        {
            "input_ids": maker.marked(maker.config.image_token_id, 4),
            "pixel_values": maker.floats(4 * BATCH, 3 * maker.config.patch_size**2),
        }
    )


def _phi(maker: Maker) -> dict[str, Any]:
    """A picture, whole and as its only part, and a sound."""
    config = maker.config
    seen = maker.marked(config.vision_config.image_token_id, 13, 2)
    heard = maker.marked(config.audio_config.audio_token_id, 5, 3)
    return _with_labels(
        {
            "input_ids": torch.cat([seen, heard], 1),
            "image_pixel_values": maker.floats(BATCH, 2, 3, 32, 32),
            "image_sizes": torch.full((BATCH, 2), 32),
            "image_attention_mask": _ones(2, 4, 4),
            "audio_input_features": maker.floats(BATCH, 40, 16),
            "audio_embed_sizes": torch.full((BATCH,), 5),
        }
    )


def _mllama(maker: Maker) -> dict[str, Any]:
    return {"cross_attention_states": maker.floats(BATCH, 7, maker.config.hidden_size)}


TOWERS: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "audioflamingo3": _audio(10),
    "fuyu": _fuyu,
    "gemma3": _gemma,
    "glmasr": _audio(5),
    "got_ocr2": _picture_of(1),
    "granite_speech": _granite,
    "granite_speech_plus": _granite,
    "mllama_text_model": _mllama,
    "modernvbert": _picture_of(1, pictures=1),
    "moss_transcribe_diarize": _audio(5),
    "musicflamingo": _audio(10),
    "nemo_speechlm": _nemotron,
    "neomme": _neomme,
    "phi4_multimodal": _phi,
    "qwen2_audio": _qwen_audio,
    "qwen3_asr": _audio(13, frames=100),
    "shieldgemma2": _shield,
    "t5gemma2": _t5_gemma,
    "ultravbert": _picture_of(1, pictures=1),
    "vibevoice_asr": _vibe,
    "voxtral": _audio(5, mask=None),
    "voxtral_realtime": _realtime,
}
