"""Make example inputs for a model of transformers from its config, for watching one forward.

The inputs follow from the names of forward's arguments and from sizes in the config. If several
inputs are possible, several examples are made; use the first with which the forward runs.
"""

import inspect
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.errors import PlanError

BATCH, LENGTH = 2, 16
_KINDS = ("input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values")
_BINS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size")
_SAMPLES = 4000  # number of audio samples


def examples(
    model: nn.Module, *, batch: int = BATCH, length: int = LENGTH
) -> Iterator[dict[str, Any]]:
    """Yield example inputs of `model.forward`, the most complete first.

    Args:
        model: a model of transformers; it may lie on the meta device.
        batch: number of rows.
        length: tokens in a row; fewer if the model has fewer positions.

    Raises:
        PlanError: no example inputs can be made for the model.
    """
    maker = _Maker(model, batch, length)
    main = str(getattr(model, "main_input_name", ""))
    kind = next((each for each in (main, *_KINDS) if each in _KINDS and each in maker.takes), None)
    if kind is None:
        raise PlanError(
            f"{type(model).__name__} takes {main!r}, of which its config gives no example. Give "
            "one: plan(model, degree=..., inputs={...}), as forward takes it."
        )
    return maker.of(kind)


class _Maker:
    """Makes tensors that fit a config."""

    def __init__(self, model: Any, batch: int, length: int) -> None:
        self.config = model.config
        self.text = self.config.get_text_config()
        self.takes = inspect.signature(model.forward).parameters
        self.batch = batch
        self.length = self._length(length)

    def _length(self, length: int) -> int:
        places = _number(self.text, "max_position_embeddings", "n_positions", "max_position")
        if getattr(self.text, "axial_pos_embds", False):  # a table of axes needs all positions
            return prod(self.text.axial_pos_shape)
        return min(length, places) if places else length

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        """Examples for each form of the main input and each form of labels."""
        mains = [main for main in getattr(self, f"_{kind}")() if main]
        for labels in self._labels(kind):
            for main in mains:
                inputs = {**main, **labels}
                if kind == "input_ids" and labels and len(main[kind]) != self.batch:
                    inputs["labels"] = self._tokens(self.batch, self.length, self._books)
                yield inputs

    def _labels(self, kind: str) -> Iterator[dict[str, Any]]:
        tokens = self._tokens(self.batch, self.length)
        if getattr(self.config, "is_encoder_decoder", False):
            if "labels" in self.takes:
                yield {"labels": tokens}
            if "decoder_input_ids" in self.takes:
                yield {"decoder_input_ids": tokens}
        elif "labels" in self.takes:
            if kind == "input_ids":
                yield {"labels": tokens}
            yield {"labels": torch.arange(self.batch) % max(1, self.config.num_labels)}
        yield {}

    def _input_ids(self) -> Iterator[dict[str, Any]]:
        ids = {"input_ids": self._tokens(self.batch, self.length)}
        yield ids
        if self._books > 1:
            yield {"input_ids": self._tokens(self.batch * self._books, self.length)}
        if "pixel_values" in self.takes:
            yield from ({**ids, **image} for image in self._pixel_values())

    @property
    def _books(self) -> int:
        return _number(self.config, "num_codebooks") or 1

    def _tokens(self, *shape: int) -> Tensor:
        vocabulary = _number(self.text, "vocab_size") or 256
        return torch.arange(prod(shape)).reshape(shape) % vocabulary

    def _pixel_values(self) -> Iterator[dict[str, Any]]:
        config = getattr(self.config, "vision_config", None) or self.config
        channels = _number(config, "num_channels", "in_channels", "in_chans") or 3
        patches, patch = _number(config, "num_patches"), _number(config, "patch_size")
        if "spatial_shapes" in self.takes and patches and patch:
            yield {  # already divided into patches
                "pixel_values": torch.zeros(self.batch, patches, channels * patch**2),
                "pixel_attention_mask": torch.ones(self.batch, patches, dtype=torch.long),
                "spatial_shapes": torch.full((self.batch, 2), int(patches**0.5)),
            }
        image = (channels, *_pair(getattr(config, "image_size", None) or 224))
        if frames := _number(config, "num_frames"):
            yield {"pixel_values": torch.zeros(self.batch, frames, *image)}
        yield {"pixel_values": torch.zeros(self.batch, *image)}

    def _pixel_values_videos(self) -> Iterator[dict[str, Any]]:
        size = getattr(self.config, "image_size", None) or getattr(self.config, "crop_size", 224)
        channels = _number(self.config, "num_channels", "in_chans") or 3
        frames = _number(self.config, "num_frames", "frames_per_clip") or 8
        yield {"pixel_values_videos": torch.zeros(self.batch, frames, channels, *_pair(size))}

    def _input_features(self) -> Iterator[dict[str, Any]]:
        config = getattr(self.config, "audio_config", None) or self.config
        bins = _number(config, *_BINS) or 80
        if places := _number(config, "max_source_positions"):  # a recording of full length
            yield {"input_features": torch.zeros(self.batch, bins, 2 * places)}
        yield {"input_features": torch.zeros(self.batch, 8 * self.length, bins)}

    def _input_values(self) -> Iterator[dict[str, Any]]:
        bins, frames = _number(self.config, "num_mel_bins"), _number(self.config, "max_length")
        if bins and frames:
            yield {"input_values": torch.zeros(self.batch, frames, bins)}
        yield {"input_values": torch.zeros(self.batch, _SAMPLES)}
        yield {"input_values": torch.zeros(self.batch, 1, _SAMPLES)}


def _number(config: Any, *names: str) -> int:
    """The first positive size that a config has under these names; 0 if there is none."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return (int(size[-2]), int(size[-1])) if isinstance(size, list | tuple) else (size, size)
