"""Draws tensors that fit a configuration: tokens, pictures, sounds."""

from typing import Any

import torch
from torch import Tensor

from zoo.example import BATCH

LOWEST_TOKEN = 30  # smaller ones mean something to some model: padding, an image, an end


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

    def marked(self, token: int, count: int, text: int = 6) -> Tensor:
        """(batch, text + count): tokens, of which `count` from the second on are `token`."""
        found = self.tokens(BATCH, text + count)
        found[:, 1 : 1 + count] = token
        return found

    def sound(self, frames: int) -> Tensor:
        """(batch, bins, frames)."""
        return self.floats(BATCH, 16, frames)
