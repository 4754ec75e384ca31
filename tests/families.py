"""Small configurations of the model families of transformers whose own plans are served."""

from typing import Any

import pytest
import torch
from torch import nn

# Sizes that divide by nothing, and fewer key-value heads than query heads.
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 44,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "tie_word_embeddings": True},
    "Olmo2": {},
    "Granite": {},
}
FAMILIES = tuple(OWN)


def config(family: str, **changes: Any) -> Any:
    """A small configuration; `changes` override it."""
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{family}Config")(**SMALL | OWN.get(family, {}) | changes)


def small(family: str, *, device: str = "cpu", **changes: Any) -> nn.Module:
    """A causal language model with random weights, the same at every call; or on meta."""
    transformers = pytest.importorskip("transformers")
    made = config(family, **changes)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(made)
    return model
