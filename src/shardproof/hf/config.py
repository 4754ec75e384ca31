"""Read config.json strictly and check its values, before transformers builds a model from it.

transformers checks few of the values. A negative size would fail deep inside or not at all, and a
million layers would be created one by one.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shardproof import files
from shardproof.checked_values import LARGEST, real_number, whole_number
from shardproof.errors import UsageError
from shardproof.hf.weights import CONFIG
from shardproof.wording import short_repr, short_text

# Configs of real models have a few KiB, or some 100 KiB with names of labels.
LARGEST_CONFIG = 16 << 20
MOST_LAYERS = 4096

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_embd",
    "n_head",
    "n_inner",
    "n_positions",
)
_LAYERS = ("num_hidden_layers", "n_layer")
_MAY_BE_NONE = ("num_key_value_heads", "head_dim", "n_inner")  # None: derived from other values
_DTYPES = ("dtype", "torch_dtype")
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta")
_SHARES = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
_PARTS = ("text_config",)

_WAY_OUT = "Correct it, or name another directory."


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a directory.

    Args:
        folder: a directory with a config.json.

    Raises:
        UsageError: it cannot be read, is not a JSON object, or has an impossible value.
    """
    path = folder / CONFIG
    shown_path = short_text(str(path))
    config = files.read_json(
        path, what=shown_path, way_out=_WAY_OUT, largest=LARGEST_CONFIG, only_finite=False
    )
    if not isinstance(config, dict):
        raise UsageError(
            f"{shown_path} holds a {type(config).__name__}, not an object with the options of a "
            f"model. {_WAY_OUT}"
        )
    problems = [*_problems(config)]
    for part in _PARTS:
        inner = config.get(part)
        if isinstance(inner, dict):
            problems += (f"{part}: {problem}" for problem in _problems(inner))
    if problems:
        raise UsageError(f"{shown_path} cannot be a model's: {'; '.join(problems[:5])}. {_WAY_OUT}")
    return config


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        yield f"model_type={short_repr(kind)} is not a name"
    for name in (*_SIZES, *_LAYERS):
        if name in config and not (config[name] is None and name in _MAY_BE_NONE):
            yield from _size_problems(name, config[name])
    for name in _DTYPES:
        if config.get(name) is not None and not _is_float(config[name]):
            yield f"{name}={short_repr(config[name])} is not a dtype of floating-point weights"
    for name in _POSITIVE:
        if config.get(name) is not None and not _lies(config[name], above=0.0, below=math.inf):
            yield f"{name}={short_repr(config[name])} is not a positive number"
    for name in _SHARES:
        if config.get(name) not in (None, 0) and not _lies(config[name], above=0.0, below=1.0):
            yield f"{name}={short_repr(config[name])} is not from 0 up to 1"
    if config.get("quantization_config"):
        yield "quantization_config: quantized weights are not supported, for they cannot be cut"


def _size_problems(name: str, value: Any) -> Iterator[str]:
    most = MOST_LAYERS if name in _LAYERS else LARGEST
    number = None if isinstance(value, float) else whole_number(value)
    if number is None or number < 1:
        yield f"{name}={short_repr(value)} is not a positive whole number"
    elif number > most:
        yield f"{name}={short_repr(number)} is more than {most}"


def _is_float(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    dtype = getattr(torch, value.removeprefix("torch."), None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _lies(value: Any, *, above: float, below: float) -> bool:
    """Whether a value is a number strictly between the two bounds."""
    number = real_number(value)
    return number is not None and above < number < below
